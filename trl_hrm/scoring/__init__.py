"""Score the steps of solutions with a reward model, in this process or on a server, and aggregate the scores."""
