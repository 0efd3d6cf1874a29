"""The HTML page of a verification or an inspection: one file, which needs no network and no script.

`page` holds the elements, the template and the file, `figures` the plots, `sections` the sections
that both pages share, `contents` the two pages.
"""
