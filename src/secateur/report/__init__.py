"""Reports for people: tables in the terminal, HTML pages, model cards and plots."""
