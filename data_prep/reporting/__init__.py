"""What `data_prep.report` counts and how it draws it."""
