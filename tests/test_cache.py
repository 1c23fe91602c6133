"Decoded images in a mapped file: the right pixels, whatever happens to the files, the cache and the processes"
from conftest import *
from fastbyol.data import CacheError, cache_folder, cached_images, decode_each, identity, load_square
from fastbyol import data as C
import json, multiprocessing, signal, subprocess, sys, time

maker = '''
import os, time, torch
from pathlib import Path
def make(fn):
    "An image that depends on what the file holds; notes that it was decoded"
    b = Path(fn).read_bytes()
    if not b.isdigit(): raise ValueError('no number')
    with open(os.environ['DECODED'], 'a') as f: f.write(Path(fn).name+' ')
    time.sleep(float(os.environ.get('PAUSE', 0)))
    return torch.full((3,8,8), int(b)%256, dtype=torch.uint8)
'''
shape = (3,8,8)

@pytest.fixture
def env(tmp_path, monkeypatch):
    "20 files, one of them unreadable, a cache folder, and a function that keeps a log of what it decodes"
    (tmp_path/'maker.py').write_text(maker); (tmp_path/'src').mkdir()
    for i in range(20): (tmp_path/'src'/f'{i:02}').write_text(str(i))
    (tmp_path/'src'/'07').write_text('x')
    monkeypatch.setenv('DECODED', str(tmp_path/'log')); monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path/'cache'))
    monkeypatch.syspath_prepend(str(tmp_path)); monkeypatch.delitem(sys.modules, 'maker', raising=False)
    monkeypatch.setattr(C, '_block', 5*192) # several blocks
    import maker as m
    files = sorted((tmp_path/'src').iterdir())
    def get(**kw): return cached_images(kw.pop('files', files), kw.pop('make', m.make), kw.pop('shape', shape), **kw)
    def decoded():
        f = tmp_path/'log'; res = f.read_text().split() if f.exists() else []
        f.unlink(missing_ok=True); return res
    return SimpleNamespace(get=get, decoded=decoded, files=files, make=m.make, cache=tmp_path/'cache', path=tmp_path)

def no_memory(fn): raise MemoryError
def pixels(images): return images[:,0,0,0].tolist()
numbers = [i for i in range(20) if i!=7]

def test_the_second_time_nothing_is_decoded_and_all_is_the_same(env):
    a = env.get(); assert len(env.decoded())==19
    with warnings.catch_warnings(): warnings.simplefilter('error'); b = env.get()
    assert env.decoded()==[] and torch.equal(a[0], b[0]) and a[1:]==b[1:]
    images,good,bad,file = b
    assert torch.equal(images, torch.stack([env.make(f) for f in good])) and good==[f for f in env.files if f.name!='07']
    assert bad==[(env.files[7],'ValueError: no number')] # told of the second time, too
    assert [f.suffix for f in env.cache.iterdir() if f.suffix!='.lock']==['.images'] and file.parent==env.cache

def stale_size(env):  env.files[3].write_text('103')
def stale_time(env):  os.utime(env.files[3], ns=(1,1))
def stale_link(env):
    (env.path/'other').write_text('77'); env.files[3].unlink(); env.files[3].symlink_to(env.path/'other')
def stale_fixed(env): env.files[7].write_text('7')
def stale_gone(env):  env.files[3].unlink()
@pytest.mark.parametrize('change,want', [(stale_size,{3:103}), (stale_time,{}), (stale_link,{3:77}), (stale_fixed,{7:7}), (stale_gone,{3:None})])
def test_changed_files_are_decoded_anew_in_place_of_the_old_cache(env, change, want):
    old = env.get()[3]; change(env); env.decoded()
    images,good,bad,file = env.get()
    new = {i:i for i in numbers}; new.update(want)
    assert pixels(images)==[v for _,v in sorted(new.items()) if v is not None] and len(env.decoded())==len(images)==len(good) and file!=old and not old.exists()

def test_files_that_could_not_be_read_are_tried_again(env):
    a = env.get()[3]; was,st = env.files[7],env.files[7].stat(); env.decoded()
    was.write_text('7'); os.utime(was, ns=(st.st_atime_ns,st.st_mtime_ns)) # as `chmod` or a setting of PIL: neither size nor time change
    with warnings.catch_warnings(): warnings.simplefilter('error'); images,good,bad,file = env.get()
    assert file==a and pixels(images)==list(range(20)) and good==env.files and bad==[]
    env.decoded(); env.get(); assert env.decoded()==[]

def test_too_little_memory_is_not_the_fault_of_a_file(env):
    with pytest.raises(MemoryError): list(decode_each([1], no_memory))
    with pytest.raises(MemoryError): env.get(make=no_memory)
    assert not list(env.cache.glob('*.images'))

def test_other_names_shapes_and_functions_have_caches_of_their_own(env):
    a = env.get()[3]; env.files[3].rename(env.path/'src'/'3a'); env.decoded()
    files = sorted((env.path/'src').iterdir()); b = env.get(files=files); assert pixels(b[0])==[0,1,2,4,5,6,8,9,*range(10,20),3] and len(env.decoded())==19
    assert env.get(files=files[:4])[3] not in (a,b[3]) and env.get(files=files[::-1])[3] not in (a,b[3]); env.decoded()
    with pytest.raises(TypeError, match=r'must be uint8 of \(1, 8, 8\)'): env.get(files=files, shape=(1,8,8))
    assert list(env.cache.glob('*.tmp'))==[]
    assert pixels(env.get(files=files, make=partial(env.make))[0])==pixels(b[0]) and len(env.decoded())>1

def truncated(b): return b[:len(b)//2]
def one_byte_short(b): return b[:-1]
def empty(b): return b''
def flipped(b): return b[:1000]+bytes([b[1000]^1])+b[1001:]
def flipped_last_pixel(b): i = 19*192-1; return b[:i]+bytes([b[i]^128])+b[i+1:]
def flipped_header(b): i = b.index(b'"bad"')+9; return b[:i]+bytes([b[i]^1])+b[i+1:]
def wrong_mark(b): return b.replace(C._mark, C._mark[::-1])
def swapped_images(b): return b[192:384]+b[:192]+b[384:]
def zeros(b): return bytes(len(b))
@pytest.mark.parametrize('spoil', [truncated,one_byte_short,empty,flipped,flipped_last_pixel,flipped_header,wrong_mark,swapped_images,zeros])
def test_a_damaged_cache_is_built_anew_with_a_warning(env, spoil):
    file = env.get()[3]; b = file.read_bytes(); st = file.stat(); file.write_bytes(spoil(b)); os.utime(file, ns=(st.st_atime_ns,st.st_mtime_ns)); env.decoded()
    assert file.read_bytes()!=b
    with pytest.warns(UserWarning, match='decoded anew') as w: images = env.get()[0]
    assert len(w)==1 and pixels(images)==numbers and len(env.decoded())==19
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert pixels(env.get()[0])==numbers
    assert env.decoded()==[] and file.read_bytes()==b

def test_a_cache_under_the_name_of_another_is_not_taken_for_it(env):
    a = env.get()[3]; b = env.get(files=env.files[10:]+env.files[:10])[3]; b.unlink(); a.rename(b)
    with pytest.warns(UserWarning, match='of other files'): images = env.get(files=env.files[10:]+env.files[:10])[0]
    assert pixels(images)==[*range(10,20), *numbers[:9]]

# --- several processes

class Builder:
    "Another process, forked from this one, that builds the cache and notes what it got"
    def __init__(self, env, pause):
        self.out = env.path/f'out{random.random()}'
        def go():
            os.environ['PAUSE'] = str(pause)
            self.out.write_text(json.dumps(pixels(env.get()[0])))
        self.p = multiprocessing.get_context('fork').Process(target=go, daemon=True); self.p.start()
    def result(self):
        self.p.join(300); assert self.p.exitcode==0, self.p.exitcode
        return json.loads(self.out.read_text())
    def kill(self): os.kill(self.p.pid, signal.SIGKILL); self.p.join(); assert self.p.exitcode==-signal.SIGKILL
    def waits(self): return self.p.is_alive() and not self.out.exists()

def wait_for(cond, seconds=300):
    end = time.time()+seconds
    while not cond():
        assert time.time()<end, 'it never came'
        time.sleep(.02)

needs_locks = pytest.mark.skipif(C.fcntl is None, reason='needs fcntl')

@needs_locks
def test_of_two_processes_one_decodes_and_both_are_right(env):
    ps = [Builder(env, .1) for _ in range(2)]; assert [p.result() for p in ps]==[numbers]*2
    assert sorted(env.decoded())==[f'{i:02}' for i in numbers] and len(list(env.cache.glob('*.images')))==1 and not list(env.cache.glob('*.tmp'))
    assert pixels(env.get()[0])==numbers and env.decoded()==[]

@needs_locks
def test_a_killed_builder_leaves_no_cache_and_keeps_nobody_waiting(env):
    p = Builder(env, 2.); log = env.path/'log'
    wait_for(lambda: log.exists() and list(env.cache.glob('*.tmp'))); q = Builder(env, 0)
    time.sleep(.5); assert q.waits()
    p.kill(); assert q.result()==numbers
    assert not list(env.cache.glob('*.tmp')) and len(list(env.cache.glob('*.images')))==1 and pixels(env.get()[0])==numbers

@pytest.mark.parametrize('locks', [pytest.param(True, marks=needs_locks),False])
def test_after_a_kill_the_next_run_begins_anew(env, locks, monkeypatch):
    p = Builder(env, 2.); wait_for(lambda: list(env.cache.glob('*.tmp'))); tmp, = env.cache.glob('*.tmp')
    p.kill(); assert tmp.exists() and not list(env.cache.glob('*.images')) # nobody could clear it away
    if not locks: monkeypatch.setattr(C, 'fcntl', None) # then it stays until `clear_cache`
    assert pixels(env.get()[0])==numbers and tmp.exists()!=locks
    clear_cache(); assert not tmp.exists()

def test_without_locks_two_builders_end_well(env, monkeypatch):
    monkeypatch.setattr(C, 'fcntl', None)
    from concurrent.futures import ThreadPoolExecutor
    monkeypatch.setenv('PAUSE', '.2')
    with ThreadPoolExecutor(2) as ex: a,b = (ex.submit(env.get) for _ in range(2))
    assert pixels(a.result()[0])==pixels(b.result()[0])==numbers and len(env.decoded())==38 # both did the work
    assert pixels(env.get()[0])==numbers and not list(env.cache.glob('*.tmp'))

@needs_locks
def test_what_others_build_is_not_cleared_away(env):
    env.get(files=env.files[:5]); p = Builder(env, .5); wait_for(lambda: list(env.cache.glob('*.tmp')))
    assert clear_cache()>0 and p.waits() and p.result()==numbers and len(list(env.cache.glob('*.images')))==1

def test_who_has_a_cache_open_keeps_it(env):
    images = env.get()[0]; clear_cache(); assert not list(env.cache.iterdir()) and pixels(images)==numbers

# --- room and memory

def test_no_room_is_an_error_before_the_work(env, monkeypatch):
    monkeypatch.setattr(C.shutil, 'disk_usage', lambda p: SimpleNamespace(free=20*192+2**20-1))
    with pytest.raises(CacheError, match=r'GB free in .*clear_cache.*cache_dir'): env.get()
    assert env.decoded()==[]
    monkeypatch.setattr(C.shutil, 'disk_usage', lambda p: SimpleNamespace(free=20*192+2**20)); assert pixels(env.get()[0])==numbers
    clear_cache()
    with pytest.raises(CacheError, match='may take 50 %'): env.get(part=.5)

def test_a_disk_that_fills_up_meanwhile_leaves_nothing(env, monkeypatch):
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(C.os, 'fsync', full)
    with pytest.raises(CacheError, match='No space left'): env.get()
    assert not list(env.cache.glob('*.images')) and not list(env.cache.glob('*.tmp'))

def test_a_folder_that_cannot_be_written_to_is_named(env):
    with pytest.raises(CacheError, match='another `cache_dir`'): env.get(cache_dir=env.files[0])
    with pytest.raises(CacheError, match='another `cache_dir`'): env.get(cache_dir=env.files[0]/'x')

def test_all_unreadable(env):
    for f in env.files: f.write_text('x')
    for _ in range(2): images,good,bad,_ = env.get(); assert images.shape==(0,*shape) and good==[] and len(bad)==20

def test_mistakes_end_the_work(env):
    with pytest.raises(ValueError, match='no number'): env.get(mistakes=(ValueError,))
    assert not list(env.cache.glob('*.images')) and not list(env.cache.glob('*.tmp'))

def big(fn): return torch.full((3,128,128), int(fn)%256, dtype=torch.uint8)
def test_building_and_opening_take_little_memory(tmp_path):
    files = [str(i) for i in range(3000)] # 147 MB
    cached_images(files[:10], big, (3,128,128), tmp_path) # what is loaded once
    assert peak_mib(lambda: cached_images(files, big, (3,128,128), tmp_path))<70
    assert peak_mib(lambda: cached_images(files, big, (3,128,128), tmp_path))<70
    images = cached_images(files, big, (3,128,128), tmp_path)[0]; assert images[::7,0,0,0].tolist()==[i%256 for i in range(0,3000,7)] and images.nbytes>140e6

def test_a_slow_consumer_is_not_overrun(monkeypatch):
    monkeypatch.setattr(defaults, 'cpus', 2); made = []
    it = decode_each(range(1000), lambda i: made.append(i) or i); next(it); time.sleep(.3); assert len(made)<=16
    assert [o for _,o in it]==list(range(1,1000))

def test_more_than_memory_can_be_mapped(tmp_path):
    n = 4*os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')
    with (tmp_path/'sparse').open('wb') as f:
        try: f.truncate(n)
        except OSError: pytest.skip('needs a file system with holes')
    with (tmp_path/'sparse').open('rb') as f: m = C._map(f, n)
    assert len(m)==n and m[-1]==0

def test_the_tensor_may_be_changed_but_not_the_file(env):
    a = env.get()[0]; env.decoded(); a.fill_(99); assert pixels(a)==[99]*19
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert pixels(env.get()[0])==numbers and env.decoded()==[]

# --- what is the same function

class Opener:
    def open(self, fn): return fn
    def __call__(self, fn): return fn
def inner():
    def f(fn): return fn
    return f
def counted(fn, n=[1]): return fn
@pytest.mark.parametrize('fn', [lambda fn: fn, Opener(), Opener().open, inner(), partial(lambda fn: fn), partial(big, x=object()), 'a'.join], ids=range(7))
def test_a_function_that_cannot_be_told_is_not_cached(fn, tmp_path):
    assert identity(fn) is None
    with pytest.raises(CacheError, match='no lambda'): cached_images(['1'], fn, shape, tmp_path)

def test_an_identity_goes_by_what_a_function_does():
    def ident(src, nm='f'):
        ns = dict(__name__='some_script'); exec(compile(src, 'a', 'exec'), ns); return identity(ns[nm])
    base = 'K = 2\ndef g(x): return x+1\ndef f(x, a=1): return g(x)*K\n'; a = ident(base)
    assert a and a==ident('\n# a comment\n'+base.replace('return g', '\n  return g'))
    for old,new in (('K = 2','K = 3'), ('x+1','x+2'), ('x+1','x-1'), ('a=1','a=2'), ('g(x)*K','g(K)*K')): assert ident(base.replace(old, new))!=a
    assert ident('def f(x): return f(x-1) if x else 0') and ident('T = object()\ndef f(x): return T') is None
    assert identity(np.load)==identity(np.load)!=identity(np.save) and identity(partial(big, 1))!=identity(partial(big, 2))

mine = """
import helper, os.path, numpy as np
from helper import Reader, f as taken
def by_module(x): return helper.f(x)
def by_class(x): return Reader().f(x)
def by_import(x):
    import helper
    return helper.f(x)
def by_inner_import(x):
    def g():
        from helper import f
        return f(x)
    return g()
def by_relative_import(x):
    from .numpy import f
    return f(x)
def by_missing(x):
    import there_is_none
def by_function(x): return taken(x)
def by_others(x):
    import json, PIL.Image
    from collections import deque
    return np.load(os.path.join(x))
"""
def test_modules_and_classes_without_a_version_cannot_be_told(tmp_path, monkeypatch):
    def load():
        for nm in ('helper','mine'): monkeypatch.delitem(sys.modules, nm, raising=False)
        import mine; return mine
    helper = 'class Reader:\n    def f(self, x): return x\ndef f(x): return x\n'
    (tmp_path/'mine.py').write_text(mine); (tmp_path/'helper.py').write_text(helper); monkeypatch.syspath_prepend(str(tmp_path)); monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    m = load(); names = [o for o in dir(m) if o.startswith('by_')]; a = {o:identity(getattr(m, o)) for o in names}
    assert [o for o in names if a[o]]==['by_function','by_others']
    with pytest.raises(CacheError, match='module or class of your own'): cached_images(['1'], m.by_module, shape, tmp_path)
    (tmp_path/'helper.py').write_text(helper.replace('return x', 'return x+1')); m = load()
    assert identity(m.by_function)!=a['by_function'] and identity(m.by_others)==a['by_others'] # what a function does is looked at
    v = []
    for i in range(2): (tmp_path/'helper.py').write_text(f'__version__ = "0.{i}"\n{helper}'); m = load(); v.append([identity(getattr(m, f'by_{o}')) for o in ('module','class','import','inner_import')])
    assert all(v[0]) and all(x!=y for x,y in zip(*v))

def test_an_identity_is_the_same_in_every_process():
    code = "from fastbyol.data import identity; from fastbyol.data import load_square; from functools import partial; print(identity(partial(load_square, n_in=3, size=20, open_fn=None)))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONHASHSEED':'1', 'PYTHONPATH':str(Path(C.__file__).parent.parent)}, check=True)
    assert r.stdout.strip()==identity(partial(load_square, n_in=3, size=20, open_fn=None))

# --- folders, and clearing

def test_the_folder_is_the_first_that_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path/'a')); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'b')); monkeypatch.setenv('HOME', str(tmp_path/'c'))
    assert cache_folder(tmp_path)==tmp_path and cache_folder()==tmp_path/'a'
    monkeypatch.delenv('FASTBYOL_CACHE'); assert cache_folder()==tmp_path/'b'/'fastbyol'
    monkeypatch.delenv('XDG_CACHE_HOME'); assert cache_folder()==tmp_path/'c'/'.cache'/'fastbyol'

def test_clearing_keeps_what_was_used_lately_and_what_is_not_ours(env):
    a = env.get()[3]; b = env.get(files=env.files[:5])[3]; env.get(files=env.files[:6])
    (env.cache/'notes.txt').write_text('mine'); (env.cache/'x.images').write_text('mine')
    for f in (a,b): os.utime(f, (1,1))
    env.get(files=env.files[:5]) # used
    assert clear_cache(days=1)>=19*192 and not a.exists() and b.exists()
    assert clear_cache()>0 and sorted(f.name for f in env.cache.iterdir())==['notes.txt','x.images'] and clear_cache()==0 and clear_cache(env.path/'none')==0
