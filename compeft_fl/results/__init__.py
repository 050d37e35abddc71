"""What a run leaves behind: journal, report, plots."""
