"The demo: what it puts aside, what it says of a folder that will not do, and that BYOL wins"
from conftest import *
import subprocess, sys
from fastbyol import demo as D

def class_folders(path, n=12, classes='ab', size=20):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i,o in enumerate(noise(n, size, seed=k)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(path/c/f'{i}.png')
    return path

def test_digits_become_the_files_of_their_classes(tmp_path):
    from sklearn.datasets import load_digits
    D.write_digits(tmp_path, size=8); data = load_digits(); f = find_images(tmp_path)
    assert len(f)==len(data.images) and all(data.target[int(o.stem)]==int(o.parent.name) for o in f)
    im = np.asarray(Image.open(tmp_path/str(data.target[5])/'0005.png')); np.testing.assert_allclose(im, data.images[5]*255/16, atol=1)

def test_no_classes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='folder for each class'): D.demo(class_folders(tmp_path/'x', classes='a'))

def test_labelled_loaders_warn_of_unreadable_files(tmp_path):
    train,test = split_files(class_folders(tmp_path/'x')); (tmp_path/'x'/'a'/'bad.png').write_bytes(b'x')
    with pytest.warns(UserWarning, match='bad.png'): dls = labelled_dls([*train, tmp_path/'x'/'a'/'bad.png'], 16, valid=test)
    assert list(dls.vocab)==['a','b'] and len(dls.train.dataset)==len(train)

def test_own_images_from_the_command_line(tmp_path):
    class_folders(tmp_path/'x')
    (tmp_path/'s.py').write_text('from fastbyol.demo import main\nmain()') # what the installed command is
    cmd = [sys.executable, tmp_path/'s.py', '--path', tmp_path/'x', '--size', '16', '--epochs', '1', '--bs', '8', '--draws', '1', '--out', tmp_path/'out'/'d.png']
    res = subprocess.run(cmd, capture_output=True, text=True, env={**os.environ, 'MPLBACKEND':'Agg'})
    assert res.returncode==0, res.stderr[-2000:]
    assert 'from scratch' in res.stdout and str(tmp_path/'out'/'d.png') in res.stdout and (tmp_path/'out'/'d.png').exists()
    cmd[3] = tmp_path/'nowhere'; res = subprocess.run(cmd, capture_output=True, text=True)
    assert res.returncode==1 and 'no folder' in res.stderr and 'Traceback' not in res.stderr

@pytest.mark.slow
def test_byol_beats_scratch_and_pixels_on_digits_put_aside(tmp_path):
    torch.set_num_threads(2)
    res = D.demo(out=tmp_path/'d.png').set_index(['contestant','per_class']); se = res['sd']/res['n']**.5
    for n in (1,2,5):
        for other in ('from scratch','pixels, nearest'):
            margin = res['mean']['BYOL, linear',n]-res['mean'][other,n]
            assert margin > max(se['BYOL, linear',n], se[other,n]), (n, other, margin)
