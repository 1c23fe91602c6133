"Folders of any layout and files of any state; the cache on disk; labelled folders; subsets of few labels"
import json, multiprocessing, signal, sys, time
from types import SimpleNamespace
from conftest import *
from fastbyol.core import dl_n, find_normalize, to_unit
from fastbyol.data import InMemoryDL, OpenFnError, first_image, load_square, mark_output
from PIL import Image
import fastbyol.data as D

def picture(h=20, w=30, mode='RGB', seed=0):
    a = np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)
    return Image.fromarray(a).convert(mode)

def write(folder, n=12, ext='.png'):
    "`n` pictures in a nested folder"
    for i in range(n):
        f = folder/f'c{i%3}'/('x'*(i%2))/f'{i:02}{ext}'
        f.parent.mkdir(parents=True, exist_ok=True)
        picture(20+i, seed=i).save(f)
    return folder

def class_folders(path, n=12, classes='ab'):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (8,8), (k*40,i,0)).save(path/c/f'{i}.png')
    return path

def cut_short(f):
    f.parent.mkdir(parents=True, exist_ok=True)
    picture(60, 60, seed=99).save(f)
    f.write_bytes(f.read_bytes()[:3000])
    return f

def make(path, **kw): return unlabelled_dls(path, **{**dict(size=16, bs=4, num_workers=0, device=cpu), **kw})
def make_labelled(path, **kw): return labelled_dls(path, 16, **{**dict(bs=4, num_workers=0, device=cpu), **kw})
def pixels(dl): return torch.cat([b[0] for b in dl.new(shuffle=False, drop_last=False)]).as_subclass(Tensor)

places = pytest.mark.parametrize('in_memory', [True,False,'disk'], ids=['memory','files','disk'])

# --- finding files

def test_any_nesting_and_any_case_of_the_extension(tmp_path):
    names = ['a.png','B.JPG','d/e/f/g.JpEg','d/h.TIFF','i j/k.bmp','l.WebP','ü/ß.GIF']
    for nm in [*names, '.hidden.png', '.git/x.png']:
        (tmp_path/nm).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path/nm)
    assert find_images(str(tmp_path))==sorted(tmp_path/o for o in names)

def test_a_linked_folder_is_followed_once(tmp_path):
    write(tmp_path/'real', 3)
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'link').symlink_to(tmp_path/'real')
    (tmp_path/'real'/'loop').symlink_to(tmp_path/'data')
    assert len(find_images(tmp_path/'data'))==3

@pytest.mark.parametrize('where,exc,msg', [('nowhere',FileNotFoundError,'no folder'),
    ('empty',FileNotFoundError,'no files at all'), ('text',FileNotFoundError,r'\.txt \(2\)'),
    ('text/a.txt',FileNotFoundError,'no folder.*a.txt')])
def test_a_wrong_path_is_an_error_that_says_what_is_there(tmp_path, where, exc, msg):
    (tmp_path/'empty').mkdir(); (tmp_path/'text').mkdir()
    for o in 'ab': (tmp_path/'text'/f'{o}.txt').write_text('no image')
    for f in (find_images, make):
        with pytest.raises(exc, match=msg): f(tmp_path/where)

def test_an_empty_list_of_files_is_named():
    with pytest.raises(FileNotFoundError, match='No images'): make([])

def test_our_own_output_is_no_data(tmp_path):
    class_folders(tmp_path, 4)
    (mark_output(tmp_path/'byol')/'deep').mkdir()
    unmarked = [('run',['curves.png','settings.json']), ('evaluation',['eval.png','eval.json'])]
    for folder,names in [('byol',['curves.png']), ('byol/deep',['x.png']), *unmarked]:
        for nm in names: (tmp_path/folder).mkdir(exist_ok=True); picture().save(tmp_path/folder/nm, 'png')
    with pytest.warns(UserWarning, match='passed over.*byol') as w: files = find_images(tmp_path)
    assert {f.parent.name for f in files}=={'a','b'} and len(w)==1
    with pytest.warns(UserWarning, match='passed over'): assert list(make_labelled(tmp_path).vocab)==['a','b']

def test_a_run_that_writes_among_the_images_hides_only_its_pictures(tmp_path):
    write(tmp_path, 3)
    mark_output(tmp_path)
    for nm in ('curves.png','settings.json'): picture().save(tmp_path/nm, 'png')
    assert len(find_images(tmp_path))==3

@pytest.mark.parametrize('ext,shown', [('.HEIC',r'\.heic \(5\)'), ('.cr2',r'\.cr2 \(5\)'), ('','no extension \\(5\\)')])
def test_many_files_of_formats_that_are_not_read_are_told(tmp_path, ext, shown):
    write(tmp_path, 10)
    for i in range(5): (tmp_path/f'x{i}{ext}').write_bytes(b'x')
    with pytest.warns(UserWarning, match=f'5 files beside 10 images.*{shown}') as w: find_images(tmp_path)
    assert len(w)==1

@pytest.mark.parametrize('n,ext', [(2,'.heic'), (9,'.txt'), (9,'.json')])
def test_few_of_them_and_notes_are_not_told(tmp_path, n, ext, recwarn):
    write(tmp_path, 10)
    for i in range(n): (tmp_path/f'x{i}{ext}').write_bytes(b'x')
    find_images(tmp_path)
    assert not len(recwarn)

@pytest.mark.parametrize('ext', ['.ckpt','.safetensors','.docx','.svg','.toml','.0'])
def test_files_that_are_no_images_are_not_to_be_converted(tmp_path, ext, recwarn):
    write(tmp_path, 10)
    for i in range(9): (tmp_path/f'events.{i}{ext}').write_bytes(b'x')
    find_images(tmp_path)
    assert not len(recwarn)

# --- opening an image

@pytest.mark.parametrize('n_in,mode', [(1,'L'),(3,'RGB'),(4,'RGBA')])
def test_every_mode_opens_in_the_mode_asked_for(tmp_path, n_in, mode):
    for saved,ext in [('L','png'),('RGB','jpg'),('RGBA','png'),('P','png'),('P','gif'),('1','png'),('LA','png'),('CMYK','jpg'),
                      ('CMYK','tif'),('I;16','png'),('I;16','tif'),('F','tif'),('YCbCr','jpg')]:
        im = picture(mode=saved) if saved!='I;16' else Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20,30)*100)
        im.save(tmp_path/f'a.{ext}')
        o = open_image(tmp_path/f'a.{ext}', n_in)
        assert (o.mode,o.size)==(mode,(30,20)) and np.asarray(o).std()>5 # it has not become black or white

@pytest.mark.parametrize('ext', ['png','tif'])
def test_16_bits_keep_their_brightness(tmp_path, ext):
    for v,want in [(0,0),(257,1),(32768,128),(65535,255)]:
        Image.fromarray(np.full((8,8), v, np.uint16)).save(tmp_path/f'a.{ext}')
        assert set(np.asarray(open_image(tmp_path/f'a.{ext}', 1)).flatten().tolist())=={want}

T = Image.Transpose # how a camera held that way stores the picture: the inverse of what a viewer does
stored = {1:None, 2:T.FLIP_LEFT_RIGHT, 3:T.ROTATE_180, 4:T.FLIP_TOP_BOTTOM, 5:T.TRANSPOSE, 6:T.ROTATE_90, 7:T.TRANSVERSE, 8:T.ROTATE_270}

@pytest.mark.parametrize('ext', ['png','tif'])
def test_exif_orientation_turns_the_photo_upright(tmp_path, ext):
    upright = picture(16, 24)
    for orientation,how in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        (upright if how is None else upright.transpose(how)).save(tmp_path/f'a.{ext}', exif=exif)
        assert np.array_equal(np.asarray(open_image(tmp_path/f'a.{ext}')), np.asarray(upright))

@pytest.mark.parametrize('orientation', [-1,-3,0,9])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, orientation, monkeypatch):
    (im := picture(16, 24)).save(tmp_path/'a.png')
    monkeypatch.setattr(Image.Image, 'getexif', lambda self: {274:orientation})
    assert np.array_equal(np.asarray(open_image(tmp_path/'a.png')), np.asarray(im))

def odd_exif(f):
    "A photo on its side, with a width that is a text"
    exif = Image.Exif()
    exif[0x0112],exif[0x010e] = 6,'wide'
    raw = exif.tobytes()
    at = raw.index(b'\x01\x0e') if b'\x01\x0e' in raw else raw.index(b'\x0e\x01')
    picture(20, 30).save(f, exif=raw[:at]+raw[at:at+2].replace(b'\x0e', b'\x00')+raw[at+2:])

def test_a_broken_tag_costs_neither_pixels_nor_orientation(tmp_path):
    odd_exif(tmp_path/'a.jpg')
    assert open_image(tmp_path/'a.jpg').size==(20,30)

def test_metadata_that_cannot_be_read_is_ignored(tmp_path, monkeypatch):
    picture().save(tmp_path/'a.png')
    def broken(self): raise SyntaxError('not a TIFF file')
    monkeypatch.setattr(Image.Image, 'getexif', broken)
    assert open_image(tmp_path/'a.png').size==(30,20)

@pytest.mark.parametrize('no_data', [-9999,-32768,3.4e38,-3.4028235e38,np.nan,np.inf])
def test_pixels_without_data_leave_the_others_their_contrast(tmp_path, no_data):
    heights = np.linspace(0, 3000, 256, dtype=np.float32).reshape(16,16)
    want = (heights*255/3000).round()
    want[3:6],heights[3:6] = 0,no_data
    Image.fromarray(heights).save(tmp_path/'a.tif')
    assert np.array_equal(np.asarray(open_image(tmp_path/'a.tif', 1)), want)

def test_the_no_data_value_that_a_tiff_names_is_believed(tmp_path):
    values = np.linspace(0, 10, 64, dtype=np.float32).reshape(8,8)
    values[0] = -5
    Image.fromarray(values).save(tmp_path/'a.tif', tiffinfo={42113:'-5'})
    got = np.asarray(open_image(tmp_path/'a.tif', 1))
    assert set(got[0])=={0} and abs(got[1:]-(values[1:]-values[1,0])*255/(10-values[1,0])).max()<=.5

@pytest.mark.parametrize('values,want', [([0,.5,1],[0,128,255]), ([0,100,255],[0,100,255]), ([-1,1],[0,255]), ([280,290,300],[0,128,255]),
    ([5,5,5],[0,0,0]), ([np.nan]*3,[0,0,0]), ([0,10000,20000,-9999],[0,128,255,0])])
def test_floats_are_spread_over_their_own_range(tmp_path, values, want):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path/'a.tif')
    assert np.abs(np.asarray(open_image(tmp_path/'a.tif', 1))[0].astype(int)-want).max()<=1

@pytest.mark.parametrize('mode', ['RGBA','LA','P'])
def test_transparent_pixels_are_white(tmp_path, mode):
    im = Image.new(mode, (4,4), {'RGBA':(255,0,0,0), 'LA':(9,0), 'P':0}[mode])
    if mode=='P': im.putpalette([255,0,0]*256)
    im.save(tmp_path/'a.png', **(dict(transparency=0) if mode=='P' else {}))
    assert np.asarray(open_image(tmp_path/'a.png')).min()==255

@pytest.mark.parametrize('hw', [(1,1),(1,400),(400,1),(2,3),(16,16),(5000,3)])
def test_images_of_any_shape_become_square(tmp_path, hw):
    picture(*hw).save(tmp_path/'a.png')
    x = load_square(tmp_path/'a.png', 3, 20)
    assert x.shape==(3,20,20) and x.dtype==torch.uint8

def test_square_is_the_middle_at_the_right_scale():
    x = np.zeros((40,100,3), np.uint8)
    x[:,30:70] = 255 # the middle square is white, all else black
    y = load_square(Image.fromarray(x), 3, 20)
    assert y[:,:,1:-1].min()==255 and y.min()>200 # bicubic looks a little beyond the edge

def test_arrays_and_tensors_of_open_fn_come_in_either_order():
    a = np.random.default_rng(0).integers(0, 256, (3,24,30), dtype=np.uint8)
    for o in (a, a.transpose(1,2,0), tensor(a), tensor(a).permute(1,2,0)):
        assert torch.equal(load_square('f', 3, 24, lambda _: o), tensor(a)[:,:,3:27])

@pytest.mark.parametrize('wrong', [np.zeros((5,20,20), np.uint8), np.zeros((3,20,20), np.float32), 'name', None, np.zeros((2,3,4,5), np.uint8)],
                         ids=range(5))
@places
def test_a_wrong_open_fn_is_an_error_not_a_bad_file(tmp_path, in_memory, wrong, monkeypatch):
    monkeypatch.setattr(D, '_source_of', str)
    with pytest.raises(TypeError, match=r'uint8 array \(3,h,w\), got'):
        make(write(tmp_path), in_memory=in_memory, open_fn=lambda f: wrong)

# --- decoding in parallel

def load_number(i):
    if i%7==3: raise ValueError(f'no {i}')
    return torch.full((3,4,4), i%256, dtype=torch.uint8)

def decode(n, load=load_number):
    "Images by their numbers, and what is wrong with the others"
    images = {}
    return images,D._decode(range(n), load, images.__setitem__, 'decoding')

@pytest.mark.parametrize('n,cpus', [(50,2),(500,2),(450,0)])
def test_files_come_in_order_with_what_is_wrong(n, cpus, monkeypatch):
    monkeypatch.setattr(defaults, 'cpus', cpus)
    images,bad = decode(n)
    assert [o.unique().tolist() for o in images.values()]==[[i%256] for i in range(n) if i%7!=3]
    assert list(images)==list(range(len(images))) and bad==[(i,f'ValueError: no {i}') for i in range(3, n, 7)]

@pytest.mark.parametrize('error', [MemoryError('full'), OpenFnError('wrong, for 3.png')])
@pytest.mark.parametrize('cpus', [0,2])
def test_what_no_file_is_to_blame_for_ends_the_work_with_its_own_message(error, cpus, monkeypatch):
    monkeypatch.setattr(defaults, 'cpus', cpus)
    def load(i): raise error
    with pytest.raises(type(error), match=str(error)): decode(400, load)

def test_processes_decode_many_files_only_and_not_inside_a_worker(monkeypatch):
    seen = []
    real = torch.utils.data.DataLoader
    def patch():
        monkeypatch.setattr(D.torch.utils.data, 'DataLoader', lambda *a, num_workers, **kw: seen.append(num_workers) or real([]))
        monkeypatch.setattr(defaults, 'cpus', 8)
    patch()
    for n in (300,600,5000): decode(n)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4'); decode(5000)
    monkeypatch.setattr(D.mp, 'current_process', lambda: SimpleNamespace(daemon=True)); decode(5000)
    monkeypatch.undo(); patch()
    monkeypatch.setattr(D.sys, 'platform', 'win32'); decode(5000)
    assert seen==[0,6,8,2,0,0]

def test_decoding_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    decode(20)
    assert torch.equal(torch.get_rng_state(), before)

def test_what_is_left_out_is_told(recwarn):
    D._warn_unreadable([], 5)
    assert not len(recwarn)
    D._warn_unreadable([(Path(f'{i}.png'), 'cut short') for i in range(12)], 30)
    text = str(recwarn.pop(UserWarning).message)
    assert '12 of 30 files' in text and '9.png (cut short)' in text and '10.png' not in text and '2 more' in text

def test_a_name_of_many_lines_is_told_on_one():
    with pytest.warns(UserWarning) as w: D._warn_unreadable([(Path('a\nb\x1b[31m.png'), 'cut\nshort')], 2)
    assert str(w[0].message).splitlines()[1:]==[r'  a\nb\x1b[31m.png (cut\nshort)']

# --- every reading path and every odd file

def odd_files(path):
    "One of each kind: name -> can it be read?"
    path.mkdir()
    cut_short(path/'truncated.png')
    for nm,text in [('empty.png',b''), ('junk.jpg',b'not an image')]: (path/nm).write_bytes(text)
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20,20)*160).save(path/'bits16.png')
    picture(mode='CMYK').save(path/'cmyk.jpg')
    picture(mode='P').save(path/'palette.png', transparency=0)
    picture(mode='LA').save(path/'grey_alpha.png')
    picture(1, 1).save(path/'pixel.png')
    odd_exif(path/'side.jpg')
    heights = np.linspace(0, 3000, 400, dtype=np.float32).reshape(20,20)
    heights[0] = -9999
    Image.fromarray(heights).save(path/'heights.tif')
    broken = {'truncated.png','empty.png','junk.jpg'}
    return {f.name:f.name not in broken for f in sorted(path.iterdir())}

def read_unlabelled(path, **kw):
    dls = make(path, bs=7, valid_pct=0, **kw)
    return dls.train_ds.items,pixels(dls.train)
def read_labelled(path, **kw):
    files = find_images(path)
    dls = make_labelled([*files, *find_images(path.parent/'other')], valid=files, **kw)
    return dls.valid_ds.items,pixels(dls.valid)
@pytest.mark.parametrize('labelled', [False,True], ids=['unlabelled','labelled'])
@pytest.mark.parametrize('in_memory,workers', [(True,0),('disk',0),('device',0),(False,0),(False,2)])
def test_every_path_reads_skips_and_names_the_same_files(tmp_path, in_memory, workers, labelled):
    odd = odd_files(tmp_path/'odd')
    class_folders(tmp_path, 4, ['other'])
    kw = dict(in_memory=in_memory, num_workers=workers, cache_dir=tmp_path/'cache')
    with pytest.warns(UserWarning, match='6 of 24' if labelled else '3 of 10') as w:
        files,x = read_labelled(tmp_path/'odd', **kw) if labelled else read_unlabelled(tmp_path/'odd', **kw)
    told = [str(o.message) for o in w if o.category is UserWarning]
    assert len(told)==1 and all((nm in told[0])!=ok for nm,ok in odd.items())
    assert [f.name for f in files]==[nm for nm,ok in odd.items() if ok]
    whole = not labelled and in_memory is not False
    want = torch.stack([load_square(f, 3, x.shape[-1], whole=whole) for f in files]).float()/255
    torch.testing.assert_close(x, want)

def test_the_quick_check_of_files_that_are_not_kept_fails_where_reading_does(tmp_path):
    odd_files(tmp_path/'odd')
    for part in (.2,.5,.99,1.):
        picture(300, 400).save(f := tmp_path/'odd'/f'{part}.jpg')
        f.write_bytes(f.read_bytes()[:int(part*f.stat().st_size)])
    opener,files = D._OpenImage(20),find_images(tmp_path/'odd')
    read = {f.name:isinstance(D._try(opener.load, f), Tensor) for f in files}
    assert read=={f.name:isinstance(D._try(opener.check, f), Tensor) for f in files}
    assert read['1.0.jpg'] and not read['0.5.jpg']

@places
@pytest.mark.parametrize('workers', [0,2])
def test_a_test_set_names_the_broken_file_and_reads_the_others(tmp_path, in_memory, workers):
    odd = odd_files(tmp_path/'odd')
    dls = make(write(tmp_path/'a'), in_memory=in_memory, cache_dir=tmp_path/'cache')
    good = [tmp_path/'odd'/nm for nm,ok in odd.items() if ok]
    x = torch.cat([b[0] for b in dls.test_dl(good, num_workers=workers)])
    torch.testing.assert_close(x.as_subclass(Tensor), torch.stack([load_square(f, 3, 20) for f in good]).float()/255)
    with pytest.raises(ValueError, match='truncated.png cannot be read.*leave it out'):
        list(dls.test_dl([*good, tmp_path/'odd'/'truncated.png'], num_workers=workers))

@places
def test_all_files_unreadable_is_an_error(tmp_path, in_memory):
    for i in range(5): (tmp_path/f'{i}.jpg').write_bytes(b'x')
    with pytest.warns(UserWarning, match='5 of 5'), pytest.raises(ValueError, match='None of the 5'): make(tmp_path, in_memory=in_memory)

# --- loaders of unlabelled images

@places
def test_the_last_short_batch_is_dropped_in_training_only(tmp_path, in_memory):
    dls = make(write(tmp_path, 13), in_memory=in_memory, valid_pct=.4, bs=3) # 8 and 5
    assert [len(b[0]) for b in dls.train]==[3,3] and [len(b[0]) for b in dls.valid]==[3,2]

@places
def test_training_sees_every_image_once_in_a_new_order_each_epoch(tmp_path, in_memory):
    dls = make(write(tmp_path), in_memory=in_memory, valid_pct=0)
    a,b = (torch.cat([o[0] for o in dls.train]).flatten(1) for _ in range(2))
    assert not torch.equal(a, b) and torch.equal(a.sum(1).sort().values, b.sum(1).sort().values) and len(a.unique(dim=0))==12

def test_batches_are_those_of_the_seed_wherever_images_are(tmp_path):
    write(tmp_path/'src')
    seen = []
    for in_memory in (True,'disk','disk','device',False): # the second time from the cache
        set_seed(0)
        dls = make(tmp_path/'src', in_memory=in_memory, cache_dir=tmp_path/'cache', valid_pct=.3, crop='middle')
        seen.append(torch.cat([b[0] for dl in (dls.train,dls.valid,dls.train) for b in dl]))
    assert all(torch.equal(seen[0], o) for o in seen[1:]) and isinstance(dls.one_batch(), tuple)

def test_views_see_all_of_an_image_or_its_middle(tmp_path):
    x = np.zeros((20,60,3), np.uint8)
    for i in range(3): x[:,20*i:20*i+20,i] = 255 # red, green, blue
    for i in range(3): Image.fromarray(x if i else x.transpose(1,0,2)).save(tmp_path/f'{i}.png')
    exif = Image.Exif(); exif[274] = 6 # lies on its side
    picture(60, 20).save(tmp_path/'3.jpg', exif=exif)
    for in_memory in (True,'disk','disk'):
        dls = make(tmp_path, valid_pct=0, in_memory=in_memory, cache_dir=tmp_path/'c')
        batch, = dls.train.new(shuffle=False).one_batch()
        assert batch.aspect.tolist()==pytest.approx([1/3,3,3,3]) and batch.shape[2:]==(20,20)
        assert batch[1].mean((1,2)).tolist()==pytest.approx([1/3]*3, abs=.02)
        middle = to_unit(batch) # for all who take images as they are
        assert (middle[:3].mean((2,3))-tensor([0.,1,0])).abs().max()<.1
        assert torch.equal(to_unit(batch, whole=True), batch.as_subclass(Tensor))
    for kw in (dict(crop='middle'), dict(in_memory=False)): # files are opened by workers, who cannot note the aspect
        batch, = make(tmp_path, valid_pct=0, **kw).train.new(shuffle=False).one_batch()
        assert not hasattr(batch, 'aspect')
        torch.testing.assert_close(batch[:3].mean((2,3)).as_subclass(Tensor), tensor([0.,1,0]).expand(3,3))
    with pytest.raises(ValueError, match="'whole' or 'middle'"): make(tmp_path, crop='centre')

def test_squares_need_no_aspect(tmp_path):
    for i in range(4): picture(20, 20, seed=i).save(tmp_path/f'{i}.png')
    assert not hasattr(make(tmp_path, valid_pct=0).one_batch()[0], 'aspect')

def test_the_split_is_that_of_the_seed(tmp_path):
    write(tmp_path)
    def split(**kw): return list(make(tmp_path, valid_pct=.5, **kw).valid_ds.items)
    a = split(seed=1)
    set_seed(9)
    assert split(seed=1)==a==split(seed=1, in_memory=False) and split(seed=2)!=a
    dls = make(tmp_path, valid_pct=.5)
    assert not set(dls.train_ds.items) & set(dls.valid_ds.items) and len(dls.train_ds)==6

@places
def test_test_dl_takes_new_files(tmp_path, in_memory):
    dls = make(write(tmp_path/'a'), in_memory=in_memory, batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False))
    new = find_images(write(tmp_path/'b', 5, '.jpg'))
    x = to_unit(torch.cat([b[0] for b in dls.test_dl(new)]), find_normalize(dls))
    torch.testing.assert_close(x, torch.stack([load_square(f,3,20) for f in new]).float()/255, atol=1e-5, rtol=0)

@places
def test_an_empty_validation_set_is_allowed(tmp_path, in_memory):
    dls = make(write(tmp_path), in_memory=in_memory, valid_pct=0)
    assert len(dls.valid)==0 and list(dls.valid)==[]

@places
@pytest.mark.parametrize('n_in', [1,4])
def test_other_channels_in_batches(tmp_path, in_memory, n_in):
    assert make(write(tmp_path), in_memory=in_memory, n_in=n_in).one_batch()[0].shape==(4,n_in,20,20)

def test_emptiness_is_asked_without_opening_anything():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(int, 1)
    assert dl_n(TfmdDL([], bs=2))==0 and dl_n(TfmdDL([1], bs=2))==1
    assert dl_n(torch.utils.data.DataLoader(Endless())) is None

def test_the_first_image_of_other_data_is_an_error():
    with pytest.raises(ValueError, match='must begin with images'): first_image(DataLoaders(*[TfmdDL([(tensor([1.]),)]*4, bs=2)]*2))

@pytest.mark.parametrize('kw,msg', [(dict(size=4),'at least 8'), (dict(size=32.),'whole number'), (dict(valid_pct=1.),'valid_pct'),
    (dict(valid_pct=-.1),'valid_pct'), (dict(bs=0),'bs'), (dict(bs=64),'Only 11 of 12 images.*bs=64: lower it'), (dict(n_in=2),'open_fn'),
    (dict(item_size=0),'item_size'), (dict(bs=True),'bs'), (dict(in_memory='gpu'),'in_memory')])
def test_wrong_arguments_are_errors_with_a_remedy(tmp_path, kw, msg):
    with pytest.raises(ValueError, match=msg): make(write(tmp_path), **kw)

def test_one_image_is_too_few_whatever_the_batch(tmp_path):
    with pytest.raises(ValueError, match='Only 1 of 1 images.*or add images'): make(write(tmp_path, 1), bs=2)

@places
@pytest.mark.parametrize('name', ['shuffle','drop_last','after_item','before_batch','after_batch'])
def test_what_the_loaders_decide_on_is_refused_by_name(tmp_path, in_memory, name):
    with pytest.raises(TypeError, match=f"multiple values for keyword argument '{name}'"): make(write(tmp_path, 4), in_memory=in_memory, **{name:[]})

def test_numbers_of_numpy_are_whole_numbers(tmp_path):
    dls = make(write(tmp_path), bs=np.int64(4), size=np.int64(16), item_size=np.int32(20), n_in=np.int64(3))
    assert dls.one_batch()[0].shape==(4,3,20,20) and type(dls.view_size) is int

# --- where images are kept

need = 12*3*20*20
def little(monkeypatch, ram=0, disk=10**12):
    "As if there were so much memory and disk"
    monkeypatch.setattr(D, '_free_memory', lambda: ram)
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: SimpleNamespace(free=disk))

@pytest.mark.parametrize('processes', [1,3])
def test_auto_goes_by_what_there_is_room_for(tmp_path, monkeypatch, processes):
    write(tmp_path/'src')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    def caches(ram, disk):
        little(monkeypatch, ram, disk)
        dls = make(tmp_path/'src', cache_dir=tmp_path/'cache')
        return isinstance(dls.train, InMemoryDL),len(list(tmp_path.glob('cache/*.npy')))
    room = 2*(need+2**20) # half of what is free
    assert caches((need+1)*4*processes, 0)==(True,0)
    with pytest.warns(UserWarning, match='every epoch.*GB free'): assert caches(need*4*processes, room-2)==(False,0)
    assert caches(need*4*processes, room)==(True,1)
    assert caches(0, 0)==(True,1) # it is there already

@pytest.mark.parametrize('limit,want', [('max',9999), ('1000',950), ('20000',9999)])
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch, limit, want):
    (tmp_path/'memory.max').write_text(limit)
    monkeypatch.setattr(D, 'Path', lambda o: tmp_path/'memory.max')
    monkeypatch.setattr(D.psutil, 'virtual_memory', lambda: SimpleNamespace(available=9999))
    monkeypatch.setattr(D.psutil, 'Process', lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=50)))
    assert D._free_memory()==want

@pytest.mark.parametrize('disk', [False,True])
def test_auto_keeps_images_on_a_device_that_has_room_and_both_loaders_share_them(tmp_path, monkeypatch, disk):
    write(tmp_path/'src')
    if disk: little(monkeypatch)
    def place(free):
        monkeypatch.setattr(D, '_free_on', lambda device: free)
        dls = make(tmp_path/'src', device='meta', valid_pct=.25, cache_dir=tmp_path/'cache')
        assert dls.valid.images is dls.train.images
        return dls.train.images.device.type
    assert place(need*8)=='cpu' and place(need*8+1)=='meta'

@pytest.mark.parametrize('mode', [True,'disk'])
def test_images_stay_where_the_user_wants_them(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(D, '_free_on', lambda device: 1e9)
    dls = make(write(tmp_path/'src'), device='meta', in_memory=mode, cache_dir=tmp_path/'cache')
    assert dls.train.images.device==cpu

def test_batches_that_may_be_on_the_device_are_not_pinned(tmp_path):
    dls = make(write(tmp_path), pin_memory=True, in_memory=True)
    for dl in (dls.train, dls.valid.new(), dls.train.new(pin_memory=True)): assert not dl.pin_memory and not dl.fake_l.pin_memory
    assert make(tmp_path, pin_memory=True, in_memory=False).train.fake_l.pin_memory

def test_a_loader_like_another_shares_its_images(tmp_path):
    dl = make(write(tmp_path), in_memory=True).train
    assert dl.new().images is dl.new(shuffle=False).images is dl.images

def test_free_memory_is_asked_of_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (7,9))
    assert D._free_on('cuda:0')==7 and D._free_on(cpu)==0

# --- the cache on disk

opener = '''
import os, time, torch
from pathlib import Path
def open_number(fn):
    "An image that depends on what the file holds; notes that it was decoded"
    text = Path(fn).read_text()
    if not text.isdigit(): raise ValueError('no number')
    with open(os.environ['DECODED'], 'a') as f: f.write(Path(fn).name+' ')
    time.sleep(float(os.environ.get('PAUSE', 0)))
    return torch.full((3,8,8), int(text)%256, dtype=torch.uint8)
'''
numbers = [i for i in range(20) if i!=7]

@pytest.fixture
def env(tmp_path, monkeypatch):
    "20 files, one of them unreadable, a cache folder, and a function that keeps a log of what it decodes"
    (tmp_path/'opener.py').write_text(opener)
    (tmp_path/'src').mkdir()
    for i in range(20): (tmp_path/'src'/f'{i:02}').write_text(str(i) if i!=7 else 'x')
    monkeypatch.setenv('DECODED', str(tmp_path/'log'))
    monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path/'cache'))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'opener', raising=False)
    import opener as m
    def files(): return sorted((tmp_path/'src').iterdir())
    def get(fs=None, open_fn=m.open_number, **kw):
        "First pixels of the images"
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='.*left out')
            dls = make(fs or files(), size=8, item_size=8, open_fn=open_fn, in_memory='disk', valid_pct=0, **kw)
        return dls.train.images[:,0,0,0].tolist()
    def decoded():
        log = tmp_path/'log'
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return len(names)
    def caches(pattern='*.npy'): return list((tmp_path/'cache').glob(pattern))
    return SimpleNamespace(get=get, decoded=decoded, files=files(), src=tmp_path/'src', path=tmp_path, caches=caches)

def test_the_second_time_nothing_is_decoded_and_all_is_the_same(env):
    assert env.get()==numbers and env.decoded()==19+1 # fastai looks at the first item
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert env.get()==numbers and env.decoded()==1
    assert json.loads(env.caches('*.json')[0].read_text())['bad']==[[7,'ValueError: no number']]

def test_what_could_not_be_read_is_named_the_second_time_too(env):
    import opener as m
    for _ in range(2):
        with pytest.warns(UserWarning, match='1 of 20 files.*(.|\n)*07 .ValueError: no number'):
            make(env.files, item_size=8, open_fn=m.open_number, in_memory='disk')

def stale_size(env): env.files[3].write_text('103')
def stale_time(env): os.utime(env.files[3], ns=(1,1))
def stale_link(env):
    (env.path/'other').write_text('77')
    env.files[3].unlink(); env.files[3].symlink_to(env.path/'other')
def stale_fixed(env): env.files[7].write_text('7')
def stale_fixed_unseen(env):
    stat = env.files[7].stat()
    stale_fixed(env); os.utime(env.files[7], ns=(stat.st_atime_ns,stat.st_mtime_ns)) # as `chmod` or a setting of PIL
@pytest.mark.parametrize('change,want', [(stale_size,{3:103}), (stale_time,{}), (stale_link,{3:77}), (stale_fixed,{7:7}),
                                         (stale_fixed_unseen,{7:7})])
def test_changed_files_are_decoded_again_in_place_of_the_old_cache(env, change, want):
    env.get(); change(env); env.decoded()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got = env.get()
    assert got==[v for _,v in sorted({**{i:i for i in numbers}, **want}.items())] and len(env.caches())==1
    env.decoded()
    assert env.get()==got and env.decoded()==1

def test_other_names_orders_sizes_and_functions_have_their_own_caches(env):
    import opener as m
    env.get()
    assert env.get(env.files[:5])==[0,1,2,3,4] and env.get(env.files[:5][::-1])==[4,3,2,1,0]
    assert len(env.caches())==3

def test_a_function_is_known_by_its_source(tmp_path, monkeypatch):
    def source(text, nm='f'):
        (tmp_path/f'mod{len(text)}.py').write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return D._source_of(getattr(importlib.import_module(f'mod{len(text)}'), nm))[1:]
    import importlib
    a = source('def f(x): return x')
    assert a==source('# comment\ndef f(x): return x') and a!=source('def f(x): return x+1')

class Opener:
    def __call__(self, fn): return fn
def inner(n):
    def f(fn): return n
    return f
@pytest.mark.parametrize('fn', [Opener(), inner(1), 'a'.join, partial(np.load)], ids=range(4))
def test_a_function_whose_source_is_not_known_is_an_error_on_disk_and_no_cache_by_itself(fn, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='source of `open_fn` is not known.*use a function of a module'):
        make(write(tmp_path), in_memory='disk', open_fn=fn)
    little(monkeypatch)
    monkeypatch.setattr(D, 'load_square', lambda *a: torch.zeros(3,20,20,dtype=torch.uint8))
    with pytest.warns(UserWarning, match='every epoch.*source'): dls = make(tmp_path, open_fn=fn)
    assert not isinstance(dls.train, InMemoryDL)

@pytest.mark.parametrize('spoil', [lambda b: b[:len(b)//2], lambda b: b[:-1], lambda b: b''], ids=['half','one byte','empty'])
@pytest.mark.parametrize('ext', ['npy','json'])
def test_a_cache_cut_short_is_made_again_with_a_warning(env, spoil, ext):
    env.get()
    file, = env.caches(f'*.{ext}')
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    with pytest.warns(UserWarning, match='cut short') as w: assert env.get()==numbers
    assert len(w)==1 and file.read_bytes()==whole

@pytest.mark.parametrize('text', ['null','[]','{}'])
def test_a_cache_whose_notes_are_others_is_made_again(env, text):
    env.get()
    env.caches('*.json')[0].write_text(text)
    with pytest.warns(UserWarning, match='cut short'): assert env.get()==numbers

class Builder:
    "Another process, forked from this one, that makes the cache and notes what it got"
    def __init__(self, env, pause):
        self.out = env.path/f'out{random.random()}'
        def go():
            os.environ['PAUSE'] = str(pause)
            self.out.write_text(json.dumps(env.get()))
        self.p = multiprocessing.get_context('fork').Process(target=go, daemon=True)
        self.p.start()
    def result(self):
        self.p.join(300)
        return json.loads(self.out.read_text())
    def kill(self):
        os.kill(self.p.pid, signal.SIGKILL)
        self.p.join()

def wait_for(cond, seconds=300):
    end = time.time()+seconds
    while not cond():
        assert time.time()<end, 'it never came'
        time.sleep(.02)

@cpu_only('a process that uses a GPU cannot be forked')
def test_of_two_processes_one_decodes_and_both_are_right(env):
    builders = [Builder(env, .02) for _ in range(2)]
    assert [o.result() for o in builders]==[numbers]*2 and env.decoded()==19+2 and len(env.caches())==1 and not env.caches('.*')

@cpu_only('a process that uses a GPU cannot be forked')
def test_a_killed_builder_leaves_no_cache_and_who_waits_takes_over(env):
    first = Builder(env, 2.)
    wait_for(lambda: (env.path/'log').exists() and env.caches('.*.tmp'))
    second = Builder(env, 0)
    time.sleep(.3)
    assert second.p.is_alive()
    first.kill()
    assert not env.caches() and second.result()==numbers and not env.caches('.*.tmp') and len(env.caches())==1

def test_who_has_a_cache_open_keeps_it(env):
    import opener as m
    with pytest.warns(UserWarning, match='left out'): dls = make(env.files, item_size=8, open_fn=m.open_number, in_memory='disk', valid_pct=0)
    shutil.rmtree(env.path/'cache')
    assert pixels(dls.train)[:,0,0,0].mul(255).tolist()==numbers

def test_a_disk_that_fills_up_meanwhile_leaves_nothing(env, monkeypatch):
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.warns(UserWarning, match='No space left'), pytest.raises(AttributeError): env.get() # no images to look up
    assert not env.caches() and not env.caches('.*')

def no_home(monkeypatch, tmp_path):
    def no(*a): raise RuntimeError('Could not determine home directory.')
    for nm in ('FASTBYOL_CACHE','XDG_CACHE_HOME'): monkeypatch.delenv(nm, raising=False)
    monkeypatch.setattr(Path, 'expanduser', no)
def read_only(monkeypatch, tmp_path): monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path/'file'/'x'))
def a_file(monkeypatch, tmp_path): monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path/'file'))
@pytest.mark.parametrize('in_memory', ['auto','disk'])
@pytest.mark.parametrize('lack', [no_home,read_only,a_file])
def test_without_a_folder_for_the_cache_files_are_read_with_one_warning(tmp_path, monkeypatch, lack, in_memory):
    write(tmp_path/'src')
    (tmp_path/'file').write_text('')
    little(monkeypatch)
    lack(monkeypatch, tmp_path)
    with pytest.warns(UserWarning, match='decoded again in every epoch') as w: dls = make(tmp_path/'src', in_memory=in_memory)
    assert len(w)==1 and dls.one_batch()[0].shape==(4,3,20,20)

def test_the_folder_is_the_first_that_is_given(monkeypatch, tmp_path):
    for nm,o in [('FASTBYOL_CACHE','a'), ('XDG_CACHE_HOME','b'), ('HOME','c')]: monkeypatch.setenv(nm, str(tmp_path/o))
    monkeypatch.setattr(D, '_open_cache', lambda file, *_: file.parent)
    def folder(cache_dir=None): return D._cached_images([], D._OpenImage(8), cache_dir, 1)
    assert folder(tmp_path)==tmp_path and folder()==tmp_path/'a'
    monkeypatch.delenv('FASTBYOL_CACHE')
    assert folder()==tmp_path/'b'/'fastbyol'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert folder()==tmp_path/'c'/'.cache'/'fastbyol'

def big(fn): return torch.full((3,128,128), int(Path(fn).name)%256, dtype=torch.uint8)
def test_building_and_opening_take_little_memory(tmp_path):
    files = [str(i) for i in range(3000)] # 147 MB
    def get(n=3000):
        return make(files[:n], size=64, item_size=128, open_fn=big, in_memory='disk', cache_dir=tmp_path, valid_pct=0, bs=2).train.images
    get(10) # what is loaded once
    assert peak_mib(get)<70 and peak_mib(get)<70
    assert get()[::7,0,0,0].tolist()==[i%256 for i in range(0,3000,7)]

# --- few labels

@pytest.mark.parametrize('seed', [0,1])
def test_few_labels_are_balanced_of_every_class_and_repeatable(seed):
    labels = np.random.default_rng(0).choice(list('abcd'), 200, p=[.6,.2,.1,.1])
    i = few_labels(range(200), labels, per_class=7, seed=seed)
    assert Counter(labels[i])=={o:7 for o in 'abcd'} and i==sorted(set(i)) and i==few_labels(range(200), labels, per_class=7, seed=seed)

def test_few_labels_differ_between_seeds_and_cover_the_class():
    draws = [few_labels(range(40), [0]*20+[1]*20, per_class=5, seed=s) for s in range(60)]
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
    (4,[0,1],dict(per_class=1),'shorter'), (4,[0,0,1,1],dict(per_class=0),'per_class')])
def test_few_labels_errors(items, labels, kw, msg):
    with pytest.raises(ValueError, match=msg): few_labels(range(items), labels, **kw)

@pytest.mark.parametrize('labels', [[[1,0],[0,1]], torch.eye(2), np.eye(2)])
def test_few_labels_of_one_hot_rows_are_an_error(labels):
    with pytest.raises(ValueError, match='one class, got.*argmax'): few_labels(range(2), labels, per_class=1)

# --- labelled folders

def test_what_is_put_aside_is_not_trained_on_and_has_every_class(tmp_path):
    train,test = split_files(class_folders(tmp_path/'x'), test_pct=.25)
    assert not set(train)&set(test) and Counter(f.parent.name for f in test)=={'a':3,'b':3} and len(train)==18
    assert split_files(tmp_path/'x', test_pct=.25)==(train,test)==split_files(find_images(tmp_path/'x'), test_pct=.25)
    assert split_files(tmp_path/'x', test_pct=.25, seed=1)[1]!=test

@pytest.mark.parametrize('names', ['train val','train valid','train validation','training testing','Train Val','TRAIN Test','train dev'])
def test_a_folder_that_is_split_already_stays_so(tmp_path, names):
    a,b = names.split()
    class_folders(tmp_path/a)
    class_folders(tmp_path/b, 3)
    train,test = split_files(tmp_path)
    assert (len(train),len(test))==(24,6) and all(b in f.parts for f in test)
    assert list(make_labelled(tmp_path).vocab)==['a','b']

@pytest.mark.parametrize('names', ['train holdout','train_images test_images','fold1 fold2','train','test','train2017 val2017'])
def test_what_looks_like_a_split_but_is_not_understood_is_asked(tmp_path, names):
    for o in names.split(): class_folders(tmp_path/o)
    with pytest.raises(ValueError, match='split, by .*Name the parts'): split_files(tmp_path)

@pytest.mark.parametrize('names', ['traindata testdata','TrainingData TestData','tr te','set1 set2','part_1 part_2','cat dog'])
def test_other_splits_are_asked_about_too(tmp_path, names):
    for o in names.split(): class_folders(tmp_path/o, classes=['train','val'] if o in ('cat','dog') else 'ab')
    with pytest.raises(ValueError, match='split, by .*Name the parts'): split_files(tmp_path)

def test_class_and_part_in_one_name_are_asked_about(tmp_path):
    class_folders(tmp_path, classes=['trainA','trainB','testA','testB'])
    with pytest.raises(ValueError, match='split, by .*Name the parts'): split_files(tmp_path)

@pytest.mark.parametrize('output', ['eval','val','train'])
def test_output_hidden_and_empty_folders_are_no_part_of_a_split(tmp_path, output):
    class_folders(tmp_path, classes=['a','b','test'])
    for o in ('.train','valid/deep'): (tmp_path/o).mkdir(parents=True)
    (mark_output(tmp_path/output)/'runs').mkdir()
    picture().save(tmp_path/output/'runs'/'a.png')
    with pytest.warns(UserWarning, match='passed over'): train,_ = split_files(tmp_path)
    assert {f.parent.name for f in train}=={'a','b','test'}

def test_a_class_of_trains_is_no_split(tmp_path):
    train,_ = split_files(class_folders(tmp_path, classes=['train','bus']))
    assert {f.parent.name for f in train}=={'train','bus'}

@pytest.mark.parametrize('top', ['','train/'])
def test_patients_within_classes_are_no_classes(tmp_path, top):
    for c in 'ab': class_folders(tmp_path/f'{top}{c}', 3, [f'{c}1',f'{c}2'])
    if top: class_folders(tmp_path/'val', 3)
    dls = make_labelled(tmp_path)
    assert list(dls.vocab)==['a','b']
    files = [*dls.train_ds.items, *dls.valid_ds.items] if not top else list(dls.train_ds.items)
    with pytest.raises(ValueError, match='pass `label_func`'): make_labelled(files)
    assert list(make_labelled(files, label_func=lambda f: f.parent.parent.name).vocab)==['a','b']

def test_an_image_beside_the_class_folders_is_named(tmp_path):
    picture().save(class_folders(tmp_path)/'loose.png')
    with pytest.raises(ValueError, match='loose.png lies in no folder'): split_files(tmp_path)

@pytest.mark.parametrize('n,pct', [(2,.9),(3,.01)])
def test_few_images_are_enough_for_both_parts(tmp_path, n, pct):
    for files in split_files(class_folders(tmp_path, n), test_pct=pct): assert {f.parent.name for f in files}=={'a','b'}

def test_a_split_that_cannot_be_is_an_error(tmp_path):
    class_folders(tmp_path/'y'/'train')
    class_folders(tmp_path/'y'/'val', 3, 'ac')
    with pytest.raises(ValueError, match='training lacks: c'): split_files(tmp_path/'y')
    with pytest.raises(ValueError, match='training lacks: c'): make_labelled(tmp_path/'y'/'train', valid=tmp_path/'y'/'val')
    with pytest.raises(ValueError, match='folder for each class'): split_files(class_folders(tmp_path/'z', classes='a'))
    with pytest.raises(ValueError, match='only 1 of b'): split_files([*find_images(tmp_path/'z'), tmp_path/'z'/'b'/'0.png'])

@pytest.mark.parametrize('label,msg', [(lambda f: 1,'each class, found 1'), (lambda f: None,'each class, found None'),
    (lambda f: int(f.stem)%2+2*('val' in f.parts),'lacks: 2, 3')])
def test_classes_that_are_no_names_are_told(tmp_path, label, msg):
    for o in ('train','val'): class_folders(tmp_path/o)
    with pytest.raises(ValueError, match=msg): split_files(tmp_path, label_func=label)

def test_classes_may_be_numbers(tmp_path):
    assert list(make_labelled(class_folders(tmp_path), label_func=lambda f: int(f.stem)%2).vocab)==[0,1]

@places
def test_labelled_batches_are_the_pixels_and_classes_of_the_files(tmp_path, in_memory):
    dls = make_labelled(class_folders(tmp_path/'x', 6), in_memory=in_memory, cache_dir=tmp_path/'cache')
    x,y = (torch.cat(o) for o in zip(*dls.valid))
    torch.testing.assert_close(x.as_subclass(Tensor), torch.stack([load_square(f, 3, 16) for f in dls.valid_ds.items]).float()/255)
    assert [dls.vocab[i] for i in y]==[f.parent.name for f in dls.valid_ds.items] and isinstance(y, TensorCategory)
    assert isinstance(dls.loss_func, CrossEntropyLossFlat) and dls.c==2 and dls.n_inp==1
    assert isinstance(dls.train, InMemoryDL)==(in_memory is not False)

@places
def test_a_broken_labelled_file_is_left_out_and_named(tmp_path, in_memory):
    class_folders(tmp_path/'x', 6)
    for c in 'ab': cut_short(tmp_path/'x'/c/'cut.png')
    with pytest.warns(UserWarning, match='2 of 14(.|\n)*cut.png') as w: dls = make_labelled(tmp_path/'x', in_memory=in_memory)
    assert len(w)==1 and sum(len(y) for _,y in dls.valid.new())+len(dls.train_ds)==12

def test_fewer_labelled_images_than_a_batch_are_a_batch(tmp_path):
    train,test = split_files(class_folders(tmp_path, 10))
    dls = make_labelled(train, valid=test, bs=64)
    assert [len(y) for _,y in dls.train]==[14] and [len(y) for _,y in dls.valid]==[6]

def test_few_labels_of_each_class_for_training_and_all_for_validation(tmp_path):
    dls = make_labelled(class_folders(tmp_path, 10), per_class=3, bs=2)
    assert Counter(f.parent.name for f in dls.train_ds.items)=={'a':3,'b':3} and len(dls.valid_ds)==4

@places
def test_random_transforms_are_for_training_only(tmp_path, in_memory):
    write(tmp_path/'x', 9)
    for d in (tmp_path/'x').iterdir():
        if (d/'x').exists(): shutil.rmtree(d/'x')
        picture(seed=7).save(d/'more.png')
    dls = make_labelled(tmp_path/'x', in_memory=in_memory, batch_tfms=aug_transforms(), valid_pct=.4, bs=2)
    assert torch.equal(pixels(dls.valid), pixels(dls.valid)) and not torch.equal(pixels(dls.train), pixels(dls.train))

@places
def test_a_classifier_is_exported_and_predicts_a_file_or_an_image(tmp_path, in_memory):
    dls = make_labelled(class_folders(tmp_path/'x', 6), in_memory=in_memory, batch_tfms=aug_transforms())
    learn = hush(Learner(dls, nn.Sequential(conv_body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,2)), path=tmp_path, metrics=accuracy))
    learn.fit(1)
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size<200_000 # without the images
    loaded,file = load_learner(tmp_path/'m.pkl'),dls.valid_ds.items[0]
    label,i,probs = learn.predict(file)
    for item in (file, str(file), PILImage.create(file)):
        got = loaded.predict(item)
        assert got[0]==label in ('a','b') and torch.allclose(got[2], probs, atol=1e-5)
