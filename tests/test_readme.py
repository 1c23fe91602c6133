"""README.md does what it says: its Python runs, block after block, and its commands exist with the options they are given

As printed that takes minutes; the run that is not slow has fewer epochs and a quarter of the digits (`quick`, `fewer`).
Nothing else is changed, and no block is left out."""
import os, re, shlex, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

root = Path(__file__).resolve().parent.parent
blocks = [(lang,code) for lang,code in re.findall(r'^```(\w+)\n(.*?)^```$', (root/'README.md').read_text(encoding='utf-8'), re.S|re.M)]
python = [code for lang,code in blocks if lang=='python']
shell = [code for lang,code in blocks if lang=='sh']

fewer = """import sklearn.datasets as _sk
_all = _sk.load_digits(); _some = _sk.load_digits(); _some.images,_some.target = _all.images[::4],_all.target[::4]
_sk.load_digits = lambda: _some"""
quick = [(r'fit_one_cycle\(\d+', 'fit_one_cycle(1'), (r'fine_tune\(\d+', 'fine_tune(1'), (r'freeze_epochs=\d+', 'freeze_epochs=1'),
         (r'seeds=\d+', 'seeds=1')]
# the first block is for photos, which are not here: a hundred small ones stand in, for an epoch, in either run
photos = [(r'fit_byol\(100\)', 'fit_byol(1)'), (r"'photos', size=128", "'photos', size=32"), (r"'labelled', size=128", "'labelled', size=32")]

def write_photos(path):
    "Two classes of coloured noise, in `photos` and in `labelled`"
    rng = np.random.default_rng(0)
    for folder,n in (('photos',50), ('labelled',10)):
        for colour,name in ((60,'dark'), (180,'light')):
            (path/folder/name).mkdir(parents=True)
            for i in range(n):
                pixels = (colour + rng.integers(0, 60, (40,40,3))).astype(np.uint8)
                Image.fromarray(pixels).save(path/folder/name/f'{i}.png')

def script(fast):
    "All Python of the README as one script"
    parts = ["import matplotlib; matplotlib.use('Agg')", fewer if fast else '']
    for i,code in enumerate(python):
        for a,b in [*photos, *(quick if fast else [])]: code = re.sub(a, b, code)
        parts += [code, f'print("block {i} is through", flush=True)']
    parts.append("assert list(Path('logs').rglob('events*')) and Path('body.onnx').stat().st_size")
    return '\n'.join([*parts, "print('accuracy', clas.recorder.values[-1][-1])"])

def run(tmp_path, fast):
    (tmp_path/'readme.py').write_text(script(fast), encoding='utf-8')
    write_photos(tmp_path)
    paths = [str(root), os.environ.get('PYTHONPATH', '')]
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(paths), 'OMP_NUM_THREADS':'1'}
    res = subprocess.run([sys.executable, '-W', 'ignore', 'readme.py'], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert res.returncode==0, (res.stdout[-1000:] + res.stderr[-3000:])
    assert [o for o in res.stdout.splitlines() if 'is through' in o]==[f'block {i} is through' for i in range(len(python))]
    return float(re.search(r'^accuracy (.+)$', res.stdout, re.M)[1])

def test_python_runs_in_order(tmp_path): run(tmp_path, fast=True)

@pytest.mark.slow
def test_python_runs_as_printed(tmp_path): assert run(tmp_path, fast=False)>.6

def test_what_is_shortened_is_there():
    for a,_ in [*quick, *photos]: assert any(re.search(a, o) for o in python), f'README.md has no {a} any more: take it out of `quick`'

# --- commands

def commands():
    "Every command of the README's sh blocks, as words"
    for line in ''.join(shell).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            n = words.index('&&') if '&&' in words else len(words)
            yield words[:n]
            words = words[n+1:]

def knows(help, words, name):
    "Every option in `words` stands in `help`"
    for o in words:
        if o.startswith('--'): assert re.search(rf'(?<![\w-]){re.escape(o.split("=")[0])}(?![\w-])', help.replace('_', '-') if '_' not in o else help), f'{name} knows no {o}'

def own_help(name, capsys, monkeypatch):
    found = [o for o in entry_points(group='console_scripts') if o.name==name]
    assert found, f'there is no command {name}'
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit) as e: found[0].load()()
    assert not e.value.code
    return capsys.readouterr().out

def test_commands_exist_and_know_their_options(capsys, monkeypatch):
    seen = set()
    for cmd,*args in commands():
        seen.add(cmd)
        if cmd=='torchrun':
            from torch.distributed.run import get_args_parser
            i = next(i for i,o in enumerate(args) if o.startswith('$('))  # $(which fastbyol-pretrain), which shlex makes two words of
            knows(get_args_parser().format_help(), args[:i], cmd)
            cmd,args = args[i+1].rstrip(')'),args[i+2:]
        if cmd.startswith('fastbyol'):
            text = own_help(cmd, capsys, monkeypatch)
            knows(text, args, cmd)
        elif cmd=='make':
            makefile = (root/'Makefile').read_text(encoding='utf-8')
            for o in args: assert re.search(rf'^{o}:', makefile, re.M), f'make has no target {o}'
        elif cmd in ('git','pip'):
            cfg = ConfigParser(); cfg.read(root/'settings.ini', encoding='utf-8')
            url = cfg['DEFAULT']['git_url']
            assert args in (['clone', url], ['install', f'git+{url}']), f'{cmd} {" ".join(args)} is not about {url}'
        else: assert cmd=='cd', f'no check of the command {cmd}: add one'
    assert {'make','git','pip','fastbyol-pretrain'}<=seen
