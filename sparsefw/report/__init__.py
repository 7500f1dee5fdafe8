"""The report of a run: the lines of its log, report.json and report.html."""
