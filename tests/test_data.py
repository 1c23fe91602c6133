"Folders of any layout and files of any state; subsets of few labels"
from conftest import *
from fastbyol.core import find_normalize, to_unit
from fastbyol.data import KeptImages, MemoryDL, OpenFnError, OpenImage, image_exts, is_empty, load_square, move_images, square_image, warn_unreadable
from PIL import Image
import fastbyol.data as D

def picture(h=20, w=30, mode='RGB', seed=0):
    a = np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)
    return Image.fromarray(a).convert(mode)

def write(folder, n=12, ext='.png', **kw):
    "`n` pictures in a nested folder"
    for i in range(n):
        f = folder/f'c{i%3}'/('x'*(i%2))/f'{i:02}{ext}'; f.parent.mkdir(parents=True, exist_ok=True); picture(20+i, seed=i, **kw).save(f)
    return folder

def make(path, **kw): return unlabelled_dls(path, **{**dict(size=16, bs=4, num_workers=0, device=cpu), **kw})

modes = pytest.mark.parametrize('in_memory', [True,False,'disk'], ids=['memory','files','disk'])

def test_any_nesting_and_any_case_of_the_extension(tmp_path):
    for i,nm in enumerate(['a.png','B.JPG','d/e/f/g.JpEg','d/h.TIFF','i j/k.bmp','l.WebP','ü/ß.GIF']):
        f = tmp_path/nm; f.parent.mkdir(parents=True, exist_ok=True); picture(seed=i).save(f)
    for nm in ('.hidden.png','.git/x.png','__x.txt'): (tmp_path/nm).parent.mkdir(exist_ok=True); (tmp_path/nm).write_bytes(b'')
    names = [o.relative_to(tmp_path).as_posix() for o in find_images(tmp_path)]
    assert sorted(names)==sorted(['a.png','B.JPG','d/e/f/g.JpEg','d/h.TIFF','i j/k.bmp','l.WebP','ü/ß.GIF'])
    assert find_images(str(tmp_path))==sorted(find_images(tmp_path))

def test_parts_that_open_a_file(tmp_path):
    assert {'.png','.jpg','.jpeg','.webp','.tiff'}<=image_exts() and all(o==o.lower() for o in image_exts())
    files = find_images(write(tmp_path/'x', 2)); (tmp_path/'x'/'bad.png').write_bytes(b'x'); bad = tmp_path/'x'/'bad.png'
    flags = torch.zeros(2); tfm = OpenImage(16, index={files[0]:0, bad:1}, flags=flags)
    assert tfm(files[0]).shape==(3,16,16) and flags.tolist()==[0,0]
    with pytest.raises(SkipItemException): tfm(bad)
    assert flags.tolist()==[0,1]
    with pytest.raises(OpenFnError): OpenImage(16, open_fn=lambda f: np.zeros((8,8,5), np.uint8))(files[0])

def test_what_is_left_out_is_told(recwarn):
    warn_unreadable([], 5); assert not len(recwarn)
    warn_unreadable([(Path(f'{i}.png'), 'cut short') for i in range(12)], 30); text = str(recwarn.pop(UserWarning).message)
    assert '12 of 30 files' in text and '9.png (cut short)' in text and '10.png' not in text and '2 more' in text

def test_emptiness_is_asked_without_opening_anything():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(int, 1)
    assert is_empty(TfmdDL([], bs=2)) and not is_empty(TfmdDL([1], bs=2)) and not is_empty(torch.utils.data.DataLoader(Endless()))

def test_a_linked_folder_is_followed(tmp_path):
    write(tmp_path/'real', 3); (tmp_path/'data').mkdir(); (tmp_path/'data'/'link').symlink_to(tmp_path/'real')
    assert len(find_images(tmp_path/'data'))==3

def test_a_link_to_a_parent_folder_is_no_trap(tmp_path):
    write(tmp_path/'a', 3); (tmp_path/'a'/'loop').symlink_to(tmp_path/'a')
    assert len(find_images(tmp_path/'a'))==3

@pytest.mark.parametrize('where,exc,msg', [('nowhere',FileNotFoundError,'no folder'), ('empty',FileNotFoundError,'no files at all'),
    ('text',FileNotFoundError,r'\.txt \(2\)'), ('text/a.txt',NotADirectoryError,'give the folder')])
def test_a_wrong_path_is_an_error_that_says_what_is_there(tmp_path, where, exc, msg):
    (tmp_path/'empty').mkdir(); (tmp_path/'text').mkdir()
    for o in 'ab': (tmp_path/'text'/f'{o}.txt').write_text('no image')
    for f in (find_images, make):
        with pytest.raises(exc, match=msg): f(tmp_path/where)

@pytest.mark.parametrize('n_in,mode', [(1,'L'),(3,'RGB'),(4,'RGBA')])
@pytest.mark.parametrize('saved,ext', [('L','png'),('RGB','jpg'),('RGBA','png'),('P','png'),('P','gif'),('1','png'),('LA','png'),('CMYK','jpg'),('CMYK','tif'),('I;16','png'),('I;16','tif'),('F','tif'),('YCbCr','jpg')])
def test_every_mode_opens_in_the_mode_asked_for(tmp_path, saved, ext, n_in, mode):
    im = Image.fromarray(np.arange(600,dtype=np.uint16).reshape(20,30)*100) if saved=='I;16' else picture(mode=saved)
    im.save(tmp_path/f'a.{ext}')
    o = open_image(tmp_path/f'a.{ext}', n_in); assert (o.mode,o.size)==(mode,(30,20))
    assert np.asarray(o).std()>5 # it has not become black or white

@pytest.mark.parametrize('v,want', [(0,0),(257,1),(32768,128),(65535,255)])
@pytest.mark.parametrize('ext', ['png','tif'])
def test_16_bits_keep_their_brightness(tmp_path, v, want, ext):
    Image.fromarray(np.full((8,8), v, np.uint16)).save(tmp_path/f'a.{ext}')
    assert set(np.asarray(open_image(tmp_path/f'a.{ext}', 1)).flatten().tolist())=={want}

@pytest.mark.parametrize('orientation', range(1,9))
def test_exif_orientation_turns_the_photo_upright(tmp_path, orientation):
    upright = picture(16, 24).resize((48,32), Image.Resampling.NEAREST)
    T = Image.Transpose # how a camera held that way stores the picture: the inverse of what a viewer does
    stored = {1:None,2:T.FLIP_LEFT_RIGHT,3:T.ROTATE_180,4:T.FLIP_TOP_BOTTOM,5:T.TRANSPOSE,6:T.ROTATE_90,7:T.TRANSVERSE,8:T.ROTATE_270}[orientation]
    exif = Image.Exif(); exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path/'a.png')), np.asarray(upright))

@pytest.mark.parametrize('mode', ['RGBA','LA','P'])
def test_transparent_pixels_are_white(tmp_path, mode):
    if mode=='P': im = Image.new('P', (4,4), 0); im.putpalette([255,0,0]*256); im.save(tmp_path/'a.png', transparency=0)
    else: Image.new(mode, (4,4), (255,0,0,0) if mode=='RGBA' else (9,0)).save(tmp_path/'a.png')
    assert set(open_image(tmp_path/'a.png').get_flattened_data() if hasattr(Image.Image,'get_flattened_data') else open_image(tmp_path/'a.png').getdata())=={(255,255,255)}

@pytest.mark.parametrize('hw', [(1,1),(1,400),(400,1),(2,3),(16,16),(5000,3)])
def test_images_of_any_shape_become_square(tmp_path, hw):
    picture(*hw).save(tmp_path/'a.png')
    x = load_square(tmp_path/'a.png', 3, 20); assert x.shape==(3,20,20) and x.dtype==torch.uint8

def test_square_is_the_middle_at_the_right_scale():
    x = np.zeros((40,100,3), np.uint8); x[:,30:70] = 255 # the middle square is white, all else black
    y = np.asarray(square_image(Image.fromarray(x), 20)); assert y[:,1:-1].min()==255 and y.min()>200 # bicubic looks a little beyond the edge

@pytest.mark.parametrize('shape', [(3,24,30),(24,30,3)])
def test_arrays_of_open_fn_come_in_either_order(tmp_path, shape):
    a = np.random.default_rng(0).integers(0,256,(3,24,30),dtype=np.uint8)
    b = a if shape[0]==3 else a.transpose(1,2,0)
    x,y = (load_square('f', 3, 24, lambda _: o) for o in (a,b)); assert torch.equal(x, y)
    assert torch.equal(x, torch.tensor(a[:,:,3:27]))

@modes
def test_unreadable_files_are_left_out_and_listed_with_a_count(tmp_path, in_memory):
    write(tmp_path)
    (tmp_path/'junk.jpg').write_bytes(b'not an image'); (tmp_path/'empty.png').write_bytes(b'')
    with pytest.warns(UserWarning, match='2 of 14 files could not be read') as w: dls = make(tmp_path, in_memory=in_memory)
    assert all(o in str(w[0].message) for o in ('junk.jpg','empty.png'))
    assert len(dls.train_ds)+len(dls.valid_ds)==12
    assert sum(len(b[0]) for dl in (dls.train,dls.valid) for b in dl)==8+1

@modes
@pytest.mark.parametrize('workers', [0,2])
def test_a_truncated_file_never_stops_an_epoch(tmp_path, in_memory, workers):
    write(tmp_path); f = tmp_path/'cut.png'; picture(60,60,seed=99).save(f); f.write_bytes(f.read_bytes()[:3000])
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        dls = make(tmp_path, in_memory=in_memory, valid_pct=0, num_workers=workers)
        for _ in range(3): # each of several processes drops a short batch of its own
            sizes = [len(b[0]) for b in dls.train]; assert set(sizes)=={4} and sum(sizes) in ((12,) if in_memory or not workers else (8,12))
    told = [str(o.message) for o in w if 'could not be read' in str(o.message)]
    assert len(told)==1 and '1 of 13' in told[0] and 'cut.png' in told[0]

def cut_short(f): picture(60,60,seed=99).save(f); f.write_bytes(f.read_bytes()[:3000])

@pytest.mark.parametrize('part', [0,1])
def test_a_truncated_file_may_be_the_first_of_its_part(tmp_path, part):
    dls = make(write(tmp_path), in_memory=False, valid_pct=.4); f = (dls.train_ds,dls.valid_ds)[part].items[0]; cut_short(f)
    with pytest.warns(UserWarning, match=rf'1 of 12(.|\n)*{f.name}'): dls = make(tmp_path, in_memory=False, valid_pct=.4)
    assert (len(dls.train_ds),len(dls.valid_ds))==(7,4) and f not in [*dls.train_ds.items, *dls.valid_ds.items]
    assert len(torch.cat([b[0] for b in dls.valid.new()]))==4 and dls.train.new().one_batch()[0].shape==(4,3,20,20)

def test_one_after_the_other_may_be_truncated(tmp_path):
    write(tmp_path, 6); files = find_images(tmp_path)
    for f in files[:-2]: cut_short(f)
    with pytest.warns(UserWarning, match='could not be read') as w: dls = make(tmp_path, in_memory=False, valid_pct=.5, bs=1)
    told = str(w[0].message); assert {*dls.train_ds.items, *dls.valid_ds.items}>=set(files[-2:]) and dls.valid.new().one_batch()[0].shape[1:]==(3,20,20) and 'truncated' in told
    for f in files[-2:]: cut_short(f)
    with pytest.warns(UserWarning, match='6 of 6'), pytest.raises(ValueError, match='None of the 6'): make(tmp_path, in_memory=False, valid_pct=.5, bs=1)

@modes
def test_all_files_unreadable_is_an_error_not_a_crash(tmp_path, in_memory):
    for i in range(5): (tmp_path/f'{i}.jpg').write_bytes(b'x')
    with pytest.warns(UserWarning, match='5 of 5'), pytest.raises(ValueError, match='None of the 5'): make(tmp_path, in_memory=in_memory)

@modes
def test_the_last_short_batch_is_dropped_in_training_only(tmp_path, in_memory):
    dls = make(write(tmp_path, 13), in_memory=in_memory, valid_pct=.4, bs=3) # 8 and 5
    assert [len(b[0]) for b in dls.train]==[3,3] and [len(b[0]) for b in dls.valid]==[3,2]

@modes
def test_batches_are_the_pixels_of_the_files(tmp_path, in_memory):
    dls = make(write(tmp_path), in_memory=in_memory, valid_pct=.25)
    x = torch.cat([b[0] for b in dls.train.new(shuffle=False, drop_last=False)])
    want = torch.stack([load_square(f, 3, 20) for f in dls.train_ds.items])
    assert torch.equal(x.as_subclass(Tensor), want.float()/255) and isinstance(dls.one_batch(), tuple) and len(dls.one_batch())==1

@modes
def test_training_sees_every_image_once_in_a_new_order_each_epoch(tmp_path, in_memory):
    dls = make(write(tmp_path), in_memory=in_memory, valid_pct=0)
    a,b = (torch.cat([o[0] for o in dls.train]).flatten(1) for _ in range(2))
    assert not torch.equal(a, b) and torch.equal(a.sum(1).sort().values, b.sum(1).sort().values) and len(a.unique(dim=0))==12

def test_the_split_is_that_of_the_seed(tmp_path):
    write(tmp_path)
    split = lambda **kw: list(make(tmp_path, valid_pct=.5, **kw).valid_ds.items)
    a = split(seed=1); set_seed(9); assert split(seed=1)==a==split(seed=1, in_memory=False) and split(seed=2)!=a
    dls = make(tmp_path, valid_pct=.5); assert not set(dls.train_ds.items)&set(dls.valid_ds.items) and len(dls.train_ds)==6

@modes
def test_test_dl_takes_new_files(tmp_path, in_memory):
    dls = make(write(tmp_path/'a'), in_memory=in_memory, batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False))
    new = find_images(write(tmp_path/'b', 5, '.jpg'))
    x = torch.cat([b[0] for b in dls.test_dl(new)])
    assert x.shape==(5,3,20,20)
    torch.testing.assert_close(to_unit(x, find_normalize(dls)), torch.stack([load_square(f,3,20) for f in new]).float()/255, atol=1e-5, rtol=0)

@modes
@pytest.mark.parametrize('place,workers', [(0,0),(1,0),(1,2)])
def test_a_test_set_loses_no_row_to_a_broken_file(tmp_path, in_memory, place, workers):
    dls = make(write(tmp_path/'a'), in_memory=in_memory); new = find_images(write(tmp_path/'b', 3)); cut_short(new[place])
    with pytest.raises(ValueError, match=f'{new[place].name} cannot be read .*truncated.*leave it out'): list(dls.test_dl(new, num_workers=workers))

@modes
def test_an_empty_validation_set_is_allowed(tmp_path, in_memory):
    dls = make(write(tmp_path), in_memory=in_memory, valid_pct=0); assert len(dls.valid)==0 and list(dls.valid)==[]

def test_opening_an_image_warns_of_nothing(tmp_path):
    picture().save(tmp_path/'a.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error'); torch.set_warn_always(True)
        try: load_square(tmp_path/'a.png', 3, 16)
        finally: torch.set_warn_always(False)

@modes
@pytest.mark.parametrize('n_in', [1,4])
def test_other_channels_in_batches(tmp_path, in_memory, n_in):
    assert make(write(tmp_path), in_memory=in_memory, n_in=n_in).one_batch()[0].shape==(4,n_in,20,20)

# --- where images are kept

need = 12*3*20*20
def little(monkeypatch, ram=0, disk=10**12):
    "As if there were so much memory and disk"
    monkeypatch.setattr(D, '_free_memory', lambda: ram)
    monkeypatch.setattr('fastbyol.data.shutil.disk_usage', lambda p: SimpleNamespace(free=disk))

@pytest.mark.parametrize('processes', [1,3])
def test_auto_goes_by_what_there_is_room_for(tmp_path, monkeypatch, processes):
    write(tmp_path/'src'); kw = dict(cache_dir=tmp_path/'cache'); monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    little(monkeypatch, (need+1)*4*processes); dls = make(tmp_path/'src', **kw); assert isinstance(dls.train, MemoryDL) and dls.train.kept.file is None
    room = 2*(need+2**20) # half of what is free
    little(monkeypatch, need*4*processes, room-2) # each process would have images of its own in memory, but one file is enough for all
    with pytest.warns(UserWarning, match='do not fit in memory.*every epoch.*GB free'): dls = make(tmp_path/'src', **kw)
    assert not isinstance(dls.train, MemoryDL) and not list((tmp_path/'cache').glob('*.images'))
    little(monkeypatch, need*4*processes, room); dls = make(tmp_path/'src', **kw); assert dls.train.kept.file.parent==tmp_path/'cache'
    little(monkeypatch, 0, 0); assert make(tmp_path/'src', **kw).train.kept.file==dls.train.kept.file # it is there already

def test_auto_without_a_cache_goes_on_with_files(tmp_path, monkeypatch):
    write(tmp_path/'src'); little(monkeypatch)
    for kw in (dict(open_fn=lambda f: open_image(f)), dict(cache_dir=find_images(tmp_path/'src')[0])):
        with pytest.warns(UserWarning, match='every epoch'): dls = make(tmp_path/'src', **kw)
        assert not isinstance(dls.train, MemoryDL) and dls.one_batch()[0].shape==(4,3,20,20)
        with pytest.raises(ValueError, match='kept'): make(tmp_path/'src', in_memory='disk', **kw)

def test_batches_from_disk_are_those_from_memory(tmp_path):
    write(tmp_path/'src'); shutil.copy(write(tmp_path/'x', 1)/'c0'/'00.png', tmp_path/'src'/'z.png'); (tmp_path/'src'/'a.jpg').write_bytes(b'x')
    for kw in ({}, dict(size=24), dict(n_in=1), dict(item_size=33), dict(open_fn=partial(open_image, n_in=3))):
        seen = []
        for mode in (True,'disk','disk'):
            set_seed(0)
            with pytest.warns(UserWarning, match=r'1 of 14.*(.|\n)*a.jpg'): dls = make(tmp_path/'src', in_memory=mode, cache_dir=tmp_path/'cache', valid_pct=.3, **kw)
            seen.append([b[0] for dl in (dls.train,dls.valid,dls.train) for b in dl])
        assert len(seen[0])>4 and all(torch.equal(a, b) and torch.equal(a, c) for a,b,c in zip(*seen))
    assert len(list((tmp_path/'cache').glob('*.images')))==5

def test_a_changed_image_is_seen_in_the_next_batches(tmp_path):
    write(tmp_path/'src'); get = lambda: make(tmp_path/'src', in_memory='disk', cache_dir=tmp_path/'cache', valid_pct=0).train.images
    a = get(); f = find_images(tmp_path/'src')[2]; picture(50, 50, seed=77).save(f); b = get()
    assert torch.equal(b[2], load_square(f, 3, 20)) and not torch.equal(a[2], b[2]) and torch.equal(a[3:], b[3:])

def test_the_mapped_file_is_no_copy_in_what_is_pickled_or_copied(tmp_path):
    import pickle
    dls = make(write(tmp_path/'src', 40), in_memory='disk', cache_dir=tmp_path/'cache', item_size=64); dl = dls.valid; b = pickle.dumps(dl.kept)
    assert len(b)<1000 and torch.equal(pickle.loads(b).images, dl.images) and deepcopy(dl.kept) is dl.kept
    assert len(pickle.dumps(dls.new_empty()))<50_000
    clear_cache(tmp_path/'cache')
    with pytest.raises(FileNotFoundError): pickle.loads(b)
    ram = KeptImages(dl.images.clone()); assert torch.equal(pickle.loads(pickle.dumps(ram)).images, dl.images)

# --- images move to the device of the batches

@pytest.mark.parametrize('device', ['meta','meta:0']) # as 'cuda' and 'cuda:0': a tensor's device may be spelled otherwise than the loader's
def test_images_move_where_there_is_room_and_both_loaders_see_it(tmp_path, monkeypatch, device):
    write(tmp_path); dls = make(tmp_path, device=device, valid_pct=.25); n,new = dls.train.images.nbytes,dls.train.new()
    monkeypatch.setattr(D, '_free_on', lambda d: {'meta':n*10//8-2}[d.type]); assert not move_images(dls) and dls.train.images.device==cpu
    monkeypatch.setattr(D, '_free_on', lambda d: {'meta':n*10//8+2}[d.type]); assert move_images(dls)
    assert dls.train.images.is_meta and dls.valid.images is dls.train.images and new.images is dls.train.images
    assert dls.train.create_batch([0,2])[0].is_meta and not move_images(dls) # they are there

@pytest.mark.parametrize('mode', [True,'disk',False])
def test_images_stay_where_the_user_wants_them(tmp_path, monkeypatch, mode):
    write(tmp_path); monkeypatch.setattr(D, '_free_on', lambda d: 1e9); dls = make(tmp_path, device='meta', in_memory=mode, cache_dir=tmp_path/'c'); assert not move_images(dls)
    if mode: assert dls.train.images.device==cpu

def test_images_on_disk_move_too_and_in_parts(tmp_path, monkeypatch):
    little(monkeypatch); monkeypatch.setattr(D, '_free_on', lambda d: 1e9); dls = make(write(tmp_path), device='meta', cache_dir=tmp_path/'c'); assert dls.train.kept.file and move_images(dls)
    x = torch.randint(0, 256, (7,3,3000,3000), dtype=torch.uint8); k = KeptImages(x) # more than one part
    k.move(cpu); assert torch.equal(k.images, x) and k.images.data_ptr()!=x.data_ptr()

def test_batches_that_may_be_on_the_device_are_not_pinned(tmp_path):
    dls = make(write(tmp_path), pin_memory=True, in_memory=True)
    for dl in (dls.train, dls.valid.new(), dls.train.new(pin_memory=True)): assert not dl.pin_memory and not dl.fake_l.pin_memory
    assert make(tmp_path, pin_memory=True, in_memory=False).train.fake_l.pin_memory

def test_a_device_that_fills_up_meanwhile_leaves_the_images_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(D, '_free_on', lambda d: 1e9); dls = make(write(tmp_path), device='meta')
    def full(*a): raise torch.OutOfMemoryError('full')
    monkeypatch.setattr(KeptImages, 'move', full); assert not move_images(dls) and dls.train.images.device==cpu

def cgroup(path, limit, used, inactive, v=2):
    path.mkdir(parents=True, exist_ok=True)
    for nm,o in zip(('memory.max','memory.current') if v==2 else ('memory.limit_in_bytes','memory.usage_in_bytes'), (limit,used)): (path/nm).write_text(f'{o}\n')
    (path/'memory.stat').write_text(f'anon 5\nactive_file 7\ninactive_file {inactive}\n')

@pytest.mark.parametrize('v,lines', [(2,'0::/job/step\n'), (1,'12:cpu,cpuacct:/\n9:memory:/job/step\n')])
def test_free_memory_is_that_of_the_container_or_job(tmp_path, monkeypatch, v, lines):
    assert D._cgroup_room(tmp_path)==math.inf # no such system
    (tmp_path/'proc/self').mkdir(parents=True); (tmp_path/'proc/self/cgroup').write_text(lines); assert D._cgroup_room(tmp_path)==math.inf
    top = tmp_path/'sys/fs/cgroup'/('' if v==2 else 'memory')
    cgroup(top, 'max' if v==2 else 2**63-4096, 900, 0, v); assert D._cgroup_room(tmp_path)>2**62 # no limit
    cgroup(top/'job', 1000, 700, 50, v); assert D._cgroup_room(tmp_path)==350
    cgroup(top/'job'/'step', 400, 300, 20, v); assert D._cgroup_room(tmp_path)==120
    cgroup(top/'job'/'step', 400, 500, 20, v); assert D._cgroup_room(tmp_path)==0
    monkeypatch.setattr(D.psutil, 'virtual_memory', lambda: SimpleNamespace(available=200))
    for room,want in ((math.inf,200), (70,70)): monkeypatch.setattr(D, '_cgroup_room', lambda: room); assert D._free_memory()==want

def test_free_memory_without_proc_and_sysconf(monkeypatch):
    monkeypatch.delattr(os, 'sysconf', raising=False); read = Path.read_text
    def none(self, *a, **kw):
        if str(self).startswith(('/proc','/sys')): raise FileNotFoundError(self)
        return read(self, *a, **kw)
    monkeypatch.setattr(Path, 'read_text', none); assert D._free_memory()>2**20

def test_free_memory_is_asked_of_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (7,9)); assert D._free_on(torch.device('cuda:0'))==7 and D._free_on(cpu)==0

def test_images_move_after_a_whole_epoch_of_training_and_nothing_else_changes(tmp_path, monkeypatch):
    write(tmp_path, 16); asked = []
    def run(**kw):
        set_seed(0); learn = byol_learn(make(tmp_path, valid_pct=.25, **kw), small_byol(bn=False), views=None, size=16)
        learn.validate(); learn.fit(3, .05); return learn
    a = run()
    def moves(self, device): asked.append(('move',str(device))); self.move(device); return True # to the CPU once more, since there is nothing else here
    monkeypatch.setattr(KeptImages, 'move_if_room', moves); monkeypatch.setattr('fastbyol.callback.BYOLCallback.after_epoch', lambda self: asked.append(('epoch',self.epoch)), raising=False)
    b = run() # the first epoch is that of `validate`
    assert asked==[('epoch',0),('epoch',0),('move','cpu'),('epoch',1),('move','cpu'),('epoch',2)] and same_sd(sd_of(a), sd_of(b))

def test_the_list_of_bad_files_is_cut_but_counted(tmp_path):
    write(tmp_path)
    for i in range(30): (tmp_path/f'bad{i:02}.jpg').write_bytes(b'x')
    with pytest.warns(UserWarning, match='30 of 42.*and 20 more'.replace('.*','(.|\n)*')) as w: make(tmp_path)
    assert len(w)==1

@pytest.mark.parametrize('kw,msg', [(dict(size=4),'at least 8'), (dict(size=32.),'whole number'), (dict(valid_pct=1.),'valid_pct'), (dict(valid_pct=-.1),'valid_pct'),
    (dict(bs=0),'bs'), (dict(bs=64),'bs='), (dict(n_in=2),'open_fn'), (dict(item_size=-3),'item_size'), (dict(item_size=0),'item_size'), (dict(bs=True),'bs'), (dict(size=True),'whole number')])
def test_wrong_arguments_are_errors_with_a_remedy(tmp_path, kw, msg):
    write(tmp_path)
    with pytest.raises(ValueError, match=msg): make(tmp_path, **kw)

@modes
@pytest.mark.parametrize('kw', [dict(shuffle=False), dict(drop_last=False), dict(after_item=[]), dict(before_batch=[]), dict(after_batch=[])], ids=str)
def test_what_the_loaders_decide_on_is_refused_by_name(tmp_path, in_memory, kw):
    nm, = kw
    with pytest.raises(TypeError, match=f'`{nm}` is no argument .* use `'): make(write(tmp_path), in_memory=in_memory, **kw)

@modes
def test_numbers_of_numpy_are_whole_numbers(tmp_path, in_memory):
    dls = make(write(tmp_path), in_memory=in_memory, bs=np.int64(4), size=np.int64(16), item_size=np.int32(20), n_in=np.int64(3))
    assert dls.one_batch()[0].shape==(4,3,20,20) and type(dls.view_size) is int

def five_channels(f): return np.zeros((5,20,20), np.uint8)
def floats(f): return np.zeros((3,20,20), np.float32)
def its_name(f): return str(f)
def nothing(f): return None
@modes
@pytest.mark.parametrize('open_fn', [five_channels, floats, its_name, nothing])
def test_a_wrong_open_fn_is_an_error_not_a_bad_file(tmp_path, in_memory, open_fn):
    write(tmp_path)
    with pytest.raises(TypeError, match='uint8 array of 3 channels'): make(tmp_path, in_memory=in_memory, open_fn=open_fn).one_batch()

def test_an_empty_list_of_files_is_named():
    with pytest.raises((ValueError,FileNotFoundError), match='empty|no files|no images'): make([])

# --- few labels

@pytest.mark.parametrize('seed', [0,1,2])
def test_few_labels_are_balanced_of_every_class_and_repeatable(seed):
    labels = np.random.default_rng(0).choice(list('abcd'), 200, p=[.6,.2,.1,.1])
    i = few_labels(range(200), labels, per_class=7, seed=seed)
    assert Counter(labels[i])=={o:7 for o in 'abcd'} and i==sorted(set(i)) and i==few_labels(range(200), labels, per_class=7, seed=seed)

def test_few_labels_differ_between_seeds_and_cover_the_class():
    labels = [0]*20+[1]*20
    draws = [few_labels(range(40), labels, per_class=5, seed=s) for s in range(60)]
    assert len({tuple(o) for o in draws})>50 and {i for o in draws for i in o}==set(range(40))

@pytest.mark.parametrize('pct,want', [(.01,1),(.1,4),(.5,20)])
def test_few_labels_by_part_of_all(pct, want):
    labels = [0]*20+[1]*60
    assert Counter(labels[i] for i in few_labels(range(80), labels, pct=pct))=={0:want,1:want}

def test_few_labels_takes_tensors_and_functions():
    items = [f'{c}/{i}' for i in range(10) for c in 'ab']
    assert few_labels(items, lambda o: o[0], per_class=3)==few_labels(items, [o[0] for o in items], per_class=3)
    assert few_labels(range(10), torch.arange(10)%2, per_class=3)==few_labels(range(10), [i%2 for i in range(10)], per_class=3)

@pytest.mark.parametrize('items,labels,kw,msg', [
    (4,[0,0,0,1],dict(per_class=2),"only 1 of 1.*lower"), (4,[0,0,1,1],dict(),'one of'), (4,[0,0,1,1],dict(per_class=1,pct=.1),'one of'),
    (4,[0,1],dict(per_class=1),'as many'), (0,[],dict(per_class=1),'empty'), (4,[0,0,1,1],dict(per_class=0),'per_class'),
    (4,[0,0,1,1],dict(per_class=1.5),'per_class'), (4,[0,0,1,1],dict(pct=0.),'pct'), (4,[0,0,1,1],dict(pct=1.1),'pct'), (4,[0,0,0,1],dict(pct=1.),'only 1')])
def test_few_labels_errors(items, labels, kw, msg):
    with pytest.raises(ValueError, match=msg): few_labels(range(items), labels, **kw)

def class_folders(path, n=12, classes='ab'):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (8,8), (k*40,i,0)).save(path/c/f'{i}.png')
    return path

def test_what_is_put_aside_is_not_trained_on_and_has_every_class(tmp_path):
    train,test = split_files(class_folders(tmp_path/'x'), test_pct=.25)
    assert not set(train)&set(test) and Counter(f.parent.name for f in test)=={'a':3,'b':3} and len(train)==18
    assert split_files(tmp_path/'x', test_pct=.25)==(train,test) and split_files(tmp_path/'x', test_pct=.25, seed=1)[1]!=test

def test_a_folder_that_is_split_already_stays_so(tmp_path):
    class_folders(tmp_path/'train'); class_folders(tmp_path/'val', 3)
    train,test = split_files(tmp_path)
    assert (len(train),len(test))==(24,6) and all('val' in f.parts for f in test)

def test_two_images_are_enough_for_both_parts(tmp_path):
    train,test = split_files(class_folders(tmp_path, 2), test_pct=.9); assert [[f.parent.name for f in o] for o in (train,test)]==[['a','b']]*2

def test_a_class_of_one_image_is_named(tmp_path):
    class_folders(tmp_path, 4, 'abc'); [(tmp_path/'b'/f'{i}.png').unlink() for i in range(3)]
    with pytest.raises(ValueError, match='only 1 of b under'): split_files(tmp_path)

def test_fewer_labelled_images_than_a_batch_are_a_batch(tmp_path):
    train,test = split_files(class_folders(tmp_path, 10)); dls = labelled_dls(train, 8, valid=test); assert [len(y) for _,y in dls.train]==[14] and [len(y) for _,y in dls.valid]==[6]
    assert [len(y) for _,y in labelled_dls(train, 8, bs=4, valid=test).train]==[4]*3

def test_a_split_that_cannot_be_is_an_error(tmp_path):
    class_folders(tmp_path/'y'/'train'); class_folders(tmp_path/'y'/'val', 3, 'ac')
    with pytest.raises(ValueError, match='training lacks: c'): split_files(tmp_path/'y')
    with pytest.raises(ValueError, match='folder for each class'): split_files(class_folders(tmp_path/'z', classes='a'))
    with pytest.raises(ValueError, match='(0,1)'): split_files(tmp_path/'y', test_pct=1)
