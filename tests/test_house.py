"The house keeps its order: rooms import downwards, private names stay at home, `fastbyol.all` shadows nothing"
import ast, builtins, importlib, json, re, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
notebooks = {p.stem[3:]:p for p in sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb'))}
rooms = list(notebooks)
trees = {o:ast.parse((root/f'fastbyol/{o}.py').read_text(encoding='utf-8')) for o in rooms}

def public(room):
    "Names in the `__all__` of a room"
    assigned = [o for o in trees[room].body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0])=='__all__']
    return [o.value for o in assigned[0].value.elts]

def imported(room):
    "(room, names) of what a room imports from other rooms when it is imported itself"
    for o in trees[room].body:
        if isinstance(o, ast.ImportFrom) and o.level==1: yield o.module, [a.name for a in o.names]

def code_cells(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

@pytest.mark.parametrize('room', rooms)
def test_rooms_import_from_rooms_above_them_alone(room):
    late = [m for m,_ in imported(room) if m in rooms and rooms.index(m)>=rooms.index(room)]
    assert not late

@pytest.mark.parametrize('room', rooms)
def test_no_room_imports_private_names(room):
    assert not [(m,n) for m,names in imported(room) for n in names if re.match('_[a-z]', n)]

@pytest.mark.parametrize('room', rooms)
def test_no_room_reaches_for_private_attributes_of_another(room):
    "`obj._name` is used where some class or function of the same room defines `_name`, or in another library"
    text = (root/f'fastbyol/{room}.py').read_text(encoding='utf-8')
    own = {o.name for o in ast.walk(trees[room]) if isinstance(o, (ast.FunctionDef,ast.ClassDef))}
    own |= {o.attr for o in ast.walk(trees[room]) if isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Store)}
    own |= {t.id for o in ast.walk(trees[room]) if isinstance(o, ast.Assign) for t in o.targets if isinstance(t, ast.Name)}
    own |= set(re.findall(r"'(_\w+)'", text)) | set(re.findall(r'\b(_\w+)=', text))
    elsewhere = {o.name for r in rooms if r!=room for o in ast.walk(trees[r]) if isinstance(o, ast.FunctionDef)}
    used = {o.attr for o in ast.walk(trees[room]) if isinstance(o, ast.Attribute) and re.match(r'_[a-z]', o.attr)}
    assert not sorted((used-own) & elsewhere)

def test_one_public_name_has_one_meaning():
    homes = {}
    for room in rooms:
        for name in public(room): homes.setdefault(name, []).append(room)
    # a command is called like the function behind it, which is no name of `fastbyol.all`
    assert not {k:v for k,v in homes.items() if len(v)>1}

@pytest.mark.parametrize('room', rooms)
def test_export_cells_are_at_most_40_lines(room):
    cells = [o for o in code_cells(notebooks[room]) if re.match(r'#\|\s*export', o)]
    assert max(len(o.splitlines())-1 for o in cells)<=40

@pytest.mark.parametrize('room', rooms)
def test_lines_are_at_most_120_characters(room):
    lines = (root/f'fastbyol/{room}.py').read_text(encoding='utf-8').splitlines()
    assert not [o for o in lines if len(o)>120 and not o.startswith('# %%')]

def test_nearly_all_lines_are_at_most_105_characters():
    lines = [o for room in rooms for o in (root/f'fastbyol/{room}.py').read_text(encoding='utf-8').splitlines()]
    lengths = sorted(len(o) for o in lines if o.strip() and not o.startswith('# %%'))
    assert lengths[int(.95*len(lengths))]<=105

@pytest.mark.parametrize('path', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda o: o.stem)
def test_shown_code_fits_a_page(path):
    "At most 88 columns, as the width of a page"
    hidden = re.compile(r'^#\|\s*(hide|export|echo: false)', re.M)
    long = [o for cell in code_cells(path) if not hidden.search(cell) for o in cell.splitlines() if len(o)>88]
    assert not long

# --- fastbyol.all

def test_all_shadows_nothing():
    import fastai.vision.all, torch
    from fastbyol.all import __all__ as names
    taken = {*dir(fastai.vision.all), *dir(torch), *dir(builtins)}
    assert not taken & set(names)

def test_all_is_short_and_has_what_the_design_names():
    from fastbyol.all import __all__ as names
    wanted = '''BYOL byol_loss BYOLLoss byol_views BYOLCallback unlabelled_dls labelled_dls few_labels byol_learner recipe
        byol_vision_learner byol_unet_learner save_body load_body to_timm get_embeddings knn_accuracy linear_eval
        label_efficiency KNNCallback OnlineProbe HealthMonitor CheckpointCallback'''.split()
    assert set(wanted)<=set(names) and len(names)<=55 and len(names)==len(set(names))
    module = importlib.import_module('fastbyol.all')
    assert all(hasattr(module, o) for o in names)

@pytest.mark.parametrize('old,new', [('labelled_loaders','labelled_dls'), ('published_body','published_encoder'),
    ('fresh_body','random_encoder'), ('as_body','as_encoder'), ('plot_embeddings','fastbyol.explore'), ('fixed_rng','fastbyol.core')])
def test_old_names_say_where_they_are_now(old, new):
    with pytest.raises(AttributeError, match=new): getattr(importlib.import_module('fastbyol.all'), old)

def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"): importlib.import_module('fastbyol.all').nonsense

def run(*args): return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=root)

def test_importing_prints_nothing():
    res = run('-c', 'from fastbyol.all import *')
    assert (res.returncode, res.stdout, res.stderr)==(0, '', '')

@pytest.mark.parametrize('room', ['explore','interop','demo','commands'])
def test_rooms_imported_by_name_begin_with_core_which_silences_a_warning_of_torch(room):
    text = (root/f'fastbyol/{room}.py').read_text(); assert text.index('from .core import *')<text.index('from fastai.')

def test_importing_leaves_fastai_alone():
    code = '''
from fastai.distributed import *
from fastai.vision.all import *
before = [DistributedDL._broadcast, Learner.to_distributed, Learner.detach_distributed, Learner.fit]
from fastbyol.all import *
after = [DistributedDL._broadcast, Learner.to_distributed, Learner.detach_distributed, Learner.fit]
assert [a is b for a,b in zip(before, after)]==[True]*4, (before, after)
'''
    res = run('-W', 'ignore', '-c', code)
    assert not res.returncode, res.stderr
