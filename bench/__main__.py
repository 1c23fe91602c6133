"Lists the measurements: `python -m bench`; runs one: `python -m bench.NAME`"
import importlib, pkgutil
import bench

for o in pkgutil.iter_modules(bench.__path__):
    if o.name not in ('__main__', 'timing', 'contestants'): print(f"python -m bench.{o.name:<8} {importlib.import_module(f'bench.{o.name}').__doc__.splitlines()[0]}")
