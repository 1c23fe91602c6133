"Lists the measurements: `python -m bench`; runs one: `python -m bench NAME`, which prints a table"
import pkgutil, runpy, sys
from importlib import import_module

import bench

shared = '__main__', 'timing', 'contestants', 'smoke'
names = [o.name for o in pkgutil.iter_modules(bench.__path__) if o.name not in shared]
if len(sys.argv)<2:
    for o in names: print(f"python -m bench {o:<8} {import_module(f'bench.{o}').__doc__.splitlines()[0]}")
    print('\nEach explains itself with --help; --json FILE keeps what it prints, --check fails where a target is missed')
elif sys.argv[1] not in names: sys.exit(f"There is no measurement {sys.argv[1]!r}: there are {', '.join(names)}")
else:
    name = sys.argv.pop(1)
    runpy.run_module(f'bench.{name}', run_name='__main__', alter_sys=True)
