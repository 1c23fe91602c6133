"Every public name is documented, and shown or tested; and what the checks of the docs look for, they find"
import dataclasses, importlib, inspect, re
from pathlib import Path

import pytest
from fastcore.docments import docments
from nbdev.processors import _default_exp
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
notebooks = {e:p for p in sorted((root/'nbs').glob('*.ipynb')) if (e := _default_exp(read_nb(p)))}
modules = sorted(notebooks)
# constants, which have no parameters: their meaning stands in the comment or the text beside them
constants = {'presets'}

def code_cells(path): return [c for c in read_nb(path).cells if c.cell_type=='code']
def is_export(cell): return re.search(r'^#\|\s*exports?\b', cell.source, re.M)

def own_params(o):
    "Names of the parameters written in the definition of `o`, without what `delegates` adds, and the function that has them"
    if inspect.isclass(o):
        f = next((vars(c)['__init__'] for c in o.__mro__ if '__init__' in vars(c)), None)
        if getattr(f, '__module__', None)!=o.__module__: return [], None  # inherited from another library: it is documented there
    else: f = o
    f = inspect.unwrap(f)
    if dataclasses.is_dataclass(o): return [k.name for k in dataclasses.fields(o)], o
    if not inspect.isfunction(f): return [], f
    c = f.__code__
    return [o for o in c.co_varnames[:c.co_argcount+c.co_kwonlyargcount] if o not in ('self','cls')], f

@pytest.mark.parametrize('module', modules)
def test_public_names_have_docments(module):
    m = importlib.import_module(f'fastbyol.{module}')
    faults = []
    for name in sorted({*m.__all__} - constants):
        o = getattr(m, name)
        if not (o.__doc__ or '').strip(): faults.append(f'{name}: no docstring')
        names, f = own_params(o)
        if not f: continue
        dm = docments(f, full=True, returns=True)
        # a parameter that takes several kinds of thing has no type: its comment names them
        faults += [f'{name}({k}): no comment' for k in names if not (dm.get(k) and dm[k].docment)]
        ret = dm.get('return')
        if not inspect.isclass(o) and ret and ret.anno not in (inspect.Parameter.empty, None) and not ret.docment: faults.append(f'{name}: no comment on what it returns')
    assert not faults, '\n'.join([f'{notebooks[module].name}:', *faults])

@pytest.mark.parametrize('module', modules)
def test_public_names_are_shown_or_tested(module):
    "Beyond its definition each name stands in an example or a test of its notebook, or in a test of tests/"
    m = importlib.import_module(f'fastbyol.{module}')
    texts = [c.source for c in code_cells(notebooks[module]) if not is_export(c)]
    texts += [p.read_text(encoding='utf-8') for p in sorted((root/'tests').glob('test_*.py')) if p.name!='test_docs.py']
    # the function behind a command is tested by the command's name
    said = lambda o: rf'\b{o}\b' + (rf'|\bfastbyol-{o.removesuffix("_main")}\b' if o.endswith('_main') else '')
    unused = [o for o in m.__all__ if not any(re.search(said(o), t) for t in texts)]
    assert not unused, f'{notebooks[module].name}: neither an example nor a test names {", ".join(unused)}'
