"The package's metadata, read from settings.ini"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser()
cfg.read_string((here/'settings.ini').read_text(encoding='utf-8'))
cfg = cfg['DEFAULT']
lines = lambda key: cfg[key].strip().splitlines()

# PyPI shows the README without the repository beside it, so its pictures need whole addresses there
readme = (here/'README.md').read_text(encoding='utf-8')
readme = re.sub(r'(!\[[^\]]*\]\(|<img [^>]*?src=")(?!\w+:)', rf'\1{cfg["git_url"]}/raw/{cfg["branch"]}/', readme)

setup(  # the name and the urls are in pyproject.toml
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license_expression=cfg['license'],
    classifiers=lines('classifiers'),
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=['fastbyol', 'fastbyol.*']),
    install_requires=lines('requirements'),
    extras_require={o: lines(f'{o}_requirements') for o in ('dev', 'bench')},
    entry_points={
        'console_scripts': lines('console_scripts'),
        'nbdev': ['fastbyol = fastbyol._modidx:d'],  # lets other nbdev projects link to our docs
    },
)
