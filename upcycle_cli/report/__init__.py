"""The HTML page of a verification or an inspection: one file without network access or script."""
