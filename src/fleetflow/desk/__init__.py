"""The desk: flow in a browser, computed on one's own machine; and the same viewer for notebooks.

server.py    the routes
guard.py     who may call them
folder.py    the temporary folder
sessions.py  one tab of a browser: its files, its jobs, and what they may take
jobs.py      one job: from frames to stored results; the queue that runs one at a time, fairly
downloads.py results as files, as `predict` writes them
page.py      the viewer as one self-contained HTML page (`fleetflow.show`)
static/      what the browser gets: plain HTML, CSS and JavaScript modules
"""
