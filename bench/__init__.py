"Measurements of speed, memory and quality against other libraries: `python -m bench` lists them, run from the repository's folder"
