"""Files: pictures, flow fields, videos. Import from the module that holds the name."""
