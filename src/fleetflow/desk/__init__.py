"""The desk: flow in a browser, computed on one's own machine; and the same viewer for notebooks.

server.py    the routes, and who may call them
sessions.py  one tab of a browser: its files, its jobs, and what they may take
jobs.py      one job: from frames to stored results; the queue that runs one at a time, fairly
page.py      the viewer as one self-contained HTML page (`fleetflow.show`)
static/      what the browser gets: plain HTML, CSS and JavaScript modules
"""
