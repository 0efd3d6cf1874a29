"""The HTML page of a verification or an inspection: one file, which needs no network and no script.

`page` holds the elements and the template, `figures` the plots, `sections` the sections that both
pages share, `contents` the two pages, `report_file` the place where a page is written.
"""
