"Measurements of speed and memory: run one with `python -m bench.NAME`, from the repository's folder"
