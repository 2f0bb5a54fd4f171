"""What users see: baselines, bench tables, plots, the HTML page."""
