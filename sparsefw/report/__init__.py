"""What a run says: the rows of the log, report.json and report.html."""
