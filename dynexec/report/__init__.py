"""What people see: baselines, bench tables, plots, the HTML page."""
