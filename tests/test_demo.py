"The demo: what it puts aside, what it says of a folder that will not do, and that BYOL wins"
from conftest import *
from sklearn.datasets import load_digits
from fastbyol import cli, demo as D
import shutil

def class_folders(path, n=12, classes='ab', size=16):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i,o in enumerate(noise(n, size, seed=k)):
            array = (o.permute(1,2,0)*255).byte().numpy()
            PILImage.create(array.copy()).save(path/c/f'{i}.png')
    return path

def test_digits_become_the_files_of_their_classes(tmp_path):
    D.write_digits(tmp_path, size=8)
    data,files = load_digits(),find_images(tmp_path)
    assert len(files)==len(data.images) and all(data.target[int(o.stem)]==int(o.parent.name) for o in files)
    image = np.asarray(Image.open(tmp_path/str(data.target[5])/'0005.png'))
    np.testing.assert_allclose(image, data.images[5]*255/16, atol=1)

def test_no_classes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='folder for each class'): D.demo(class_folders(tmp_path/'x', classes='a'))

def test_own_images_from_the_command_line(tmp_path, capsys, monkeypatch):
    def few(*args, **kwargs): return label_efficiency(*args, **{**kwargs, 'steps':1})
    monkeypatch.setattr(D, 'label_efficiency', few)
    data,out = class_folders(tmp_path/'x'),tmp_path/'out'/'d.png'
    def demo(path): return cli.run_command(cli.demonstrate, 'fastbyol-demo', [str(o) for o in ('--path', path, *args)])
    args = ['--size', 16, '--epochs', 1, '--bs', 8, '--draws', 1, '--out', out]
    assert demo(data)==0
    text = capsys.readouterr().out
    assert 'from scratch' in text and str(out) in text and out.exists() and (out.parent/'.fastbyol').exists()
    assert demo(tmp_path/'nowhere')==2 and 'no folder' in capsys.readouterr().err

@pytest.mark.parametrize('name', ['demo.png','a/0.png'])
def test_a_picture_among_the_images_is_refused(tmp_path, name):
    data = class_folders(tmp_path/'x')
    files = find_images(data)
    with pytest.raises(ValueError, match='choose another `out`'): D.demo(data, out=data/name)
    assert find_images(data)==files

@pytest.fixture
def found(monkeypatch):
    "The labelled images that the demo would learn from"
    found = []
    def stop(dl, *args, **kwargs): found.append(dl.dataset); 1/0
    monkeypatch.setattr(D, 'pick_items', stop)
    return found

def test_a_picture_in_a_folder_of_its_own_is_no_image(tmp_path, found):
    data = class_folders(tmp_path/'x')
    (data/'demo').mkdir()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError): D.demo(data, bs=8, out=data/'demo'/'demo.png')
        shutil.copy(data/'a'/'0.png', data/'demo'/'demo.png')
    assert len(found[0])==len(found[1]) and found[1].vocab==['a','b']

def test_folders_inside_classes_and_a_broken_file(tmp_path, found):
    data = class_folders(tmp_path/'x', classes=['a/1','a/2','b/1'])
    (data/'a'/'1'/'cut.png').write_bytes(b'no')
    with pytest.warns(UserWarning, match='1 of 37 files') as told, pytest.raises(ZeroDivisionError): D.demo(data, bs=8)
    assert found[0].vocab==['a','b'] and sum('cut.png' in str(o.message) for o in told)==1

@pytest.mark.slow
def test_byol_beats_scratch_and_pixels_on_digits_put_aside(tmp_path):
    torch.set_num_threads(2)
    res = D.demo(out=tmp_path/'d.png').set_index(['contestant','per_class'])
    se = res['sd']/res['n']**.5
    for n in (1,2,5):
        for other in ('from scratch','pixels, nearest'):
            margin = res['mean']['BYOL, linear',n]-res['mean'][other,n]
            assert margin > max(se['BYOL, linear',n], se[other,n]), (n, other, margin)
