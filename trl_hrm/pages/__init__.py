"""HTML pages, tables and pictures of reports, and the style that they share."""
