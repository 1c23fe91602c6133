"What users get: the sdist builds a wheel, and the wheel has every module and command"
import shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from the sdist, so that a file missing from the sdist shows; from a copy, since a build leaves files"
    tmp = tmp_path_factory.mktemp('package')
    src = tmp/'src'
    shutil.copytree(root, src, ignore=shutil.ignore_patterns('.venv', '.git', 'nbs', '*.egg-info', 'build', 'dist', '__pycache__'))
    res = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp/'dist', src], capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    return zipfile.ZipFile(next((tmp/'dist').glob('*.whl')))

def test_wheel_has_every_module(wheel):
    modules = {p.relative_to(root).as_posix() for p in root.glob('fastbyol/**/*.py')}
    assert {o for o in wheel.namelist() if o.endswith('.py')} == modules

def test_wheel_has_the_metadata_of_settings_ini(wheel):
    cfg = ConfigParser()
    cfg.read(root/'settings.ini', encoding='utf-8')
    text = {Path(o).name: wheel.read(o).decode() for o in wheel.namelist() if '.dist-info/' in o}
    for o in cfg['DEFAULT']['requirements'].split(): assert f'Requires-Dist: {o}\n' in text['METADATA']
    assert f'Version: {cfg["DEFAULT"]["version"]}\n' in text['METADATA']
    for o in cfg['DEFAULT']['console_scripts'].split(): assert o.replace('=', ' = ') in text['entry_points.txt']
    assert 'fastbyol = fastbyol._modidx:d' in text['entry_points.txt']
