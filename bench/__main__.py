"Lists the measurements: `python -m bench`; runs one: `python -m bench NAME`, which prints a table, and writes JSON and a bar chart where asked to"
import pkgutil, runpy, sys
from importlib import import_module

import bench

names = [o.name for o in pkgutil.iter_modules(bench.__path__) if o.name not in ('__main__', 'timing', 'contestants')]
if len(sys.argv)<2:
    for o in names: print(f"python -m bench {o:<8} {import_module(f'bench.{o}').__doc__.splitlines()[0]}")
    print('\nEach explains itself with --help; --json FILE and --chart FILE keep what it prints, --check fails where a target is missed')
elif sys.argv[1] not in names: sys.exit(f"There is no measurement {sys.argv[1]!r}: there are {', '.join(names)}")
else:
    name = sys.argv.pop(1)
    runpy.run_module(f'bench.{name}', run_name='__main__', alter_sys=True)
