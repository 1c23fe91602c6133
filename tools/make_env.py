"""Make .venv with the Python that runs this file, and install fastbyol in it; where that is done already, do nothing

    python3 tools/make_env.py        # the package and what it needs
    python3 tools/make_env.py dev    # and what its developers need

`make` calls this first. One file of Python, since only the interpreter itself knows its version and what it lacks.
"""
# An interpreter that is too old must get as far as the message that says so: nothing newer than Python 2.7 here.
import hashlib, io, os, re, shutil, subprocess, sys

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
env = os.path.join(root, '.venv')
env_python = os.path.join(env, 'bin', 'python')
stamp_file = os.path.join(env, 'fastbyol.stamp')

def read(path):
    with io.open(os.path.join(root, path), encoding='utf-8') as f: return f.read()

def run(*args):
    if subprocess.call(args, cwd=root): sys.exit('Failed: ' + ' '.join(args))

def check_interpreter():
    wanted = re.search(r'^min_python = (.+)$', read('settings.ini'), re.M).group(1)
    if sys.version_info[:2] < tuple(int(o) for o in wanted.split('.')):
        sys.exit('fastbyol needs Python %s or newer, and %s is %s: name another, as in `make PYTHON=python%s`'
                 % (wanted, sys.executable, sys.version.split()[0], wanted))
    try: import ensurepip, venv
    except ImportError as e:
        sys.exit('%s cannot make a virtual environment (%s): install its venv module (on Debian and Ubuntu the package '
                 'python%d.%d-venv), or name another Python, as in `make PYTHON=python%s`'
                 % ((sys.executable, e) + sys.version_info[:2] + (wanted,)))

def why_rebuild(stamp):
    "What is wrong with the .venv that is there, or None"
    if stamp and stamp[0] != root: return 'it was made for %s' % stamp[0]  # a copied checkout: it would test the other one
    asked = '%d.%d' % sys.version_info[:2]
    probe = 'import sys, pip; print("%d.%d" % sys.version_info[:2])'
    try: found = subprocess.check_output([env_python, '-c', probe], stderr=subprocess.STDOUT).decode().strip()
    except (OSError, subprocess.CalledProcessError): return 'it does not work'
    if found != asked: return 'it has Python %s, and %s is asked for' % (found, asked)

def main(extra=''):
    check_interpreter()
    metadata = ''.join(read(o) for o in ('settings.ini', 'setup.py', 'pyproject.toml'))
    wanted = [root, hashlib.sha256(metadata.encode('utf-8')).hexdigest()]
    stamp = read(stamp_file).split('\n') if os.path.exists(stamp_file) else None
    if os.path.exists(env):
        why = why_rebuild(stamp)
        if why:
            print('Making .venv anew: %s' % why)
            shutil.rmtree(env)
            stamp = None
    if not os.path.exists(env): run(sys.executable, '-m', 'venv', env)
    if stamp and stamp[:2] == wanted and stamp[2] in (extra, 'dev'): return  # `dev` has all that the plain one has
    what = '.[%s]' % extra if extra else '.'
    print('Installing %s into .venv with Python %s: some minutes the first time' % (what, sys.version.split()[0]))
    sys.stdout.flush()
    # errors only; one call for everything, so that pip finds versions of torch and torchvision that fit each other
    run(env_python, '-m', 'pip', 'install', '-qq', '--disable-pip-version-check', '--editable', what)
    with io.open(stamp_file, 'w', encoding='utf-8') as f: f.write(u'\n'.join(wanted + [extra]))

if __name__ == '__main__': main(*sys.argv[1:])
