"""The commands of `trl-hrm`: one file each, and the code that the training commands share."""
