"""``fedpers report``: the runs of some folders as one page of HTML that needs nothing but a browser."""
