"The measurements run, count right, and say so where a target is missed; other libraries are not needed"
from conftest import *
import json, subprocess, sys
from types import SimpleNamespace
from bench import timing as T

root = Path(__file__).parent.parent
def bench(*args, rc=0):
    res = subprocess.run([sys.executable, '-m', 'bench', *map(str, args)], capture_output=True, text=True, cwd=root, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert res.returncode==rc, res.stdout+res.stderr
    return res.stdout+res.stderr

@pytest.fixture
def photos(tmp_path):
    for part,n in (('train',12),('val',4)):
        for k,c in enumerate('ab'):
            (tmp_path/part/c).mkdir(parents=True)
            for i,o in enumerate(noise(n, 24, seed=k)): PILImage.create((o.permute(1,2,0)*255).byte().numpy().copy()).save(tmp_path/part/c/f'{i}.png')
    return tmp_path

def test_turns_are_interleaved_and_the_first_is_not_counted():
    calls = []
    runs = T.in_turns({o: (lambda o=o: calls.append(o) or len(calls)) for o in 'ab'}, 2)
    assert calls==list('ababab') and runs==dict(a=[3,5], b=[4,6])
    assert T.in_turns(dict(a=lambda: [1,2]), 2)==dict(a=[1,2,1,2])
    assert T.spread([3,1,2])==dict(median=2, least=1, most=3, n=3)

def test_a_missed_target_is_said(capsys):
    assert T.verdict([('time', 1., 2., True), ('speed', 3., 2., False)]) and 'NOT' not in capsys.readouterr().out
    assert not T.verdict([('time', 3., 2., True)]) and not T.verdict([('speed', 1., 2., False)]) and capsys.readouterr().out.count('NOT REACHED')==2

def test_memory_is_that_of_the_process():
    before = T.memory('VmRSS'); x = torch.ones(50_000_000, dtype=torch.uint8)
    assert 40<T.memory('VmRSS')-before<70 and T.memory('VmHWM')>=T.memory('VmRSS')-1

def test_steps_are_timed_after_those_in_which_graphs_are_captured():
    from bench.gpu import train_steps
    import time
    class Slow(Callback):
        def before_batch(self):
            if self.train_iter<2: time.sleep(1)
    assert train_steps(byol_learn(cbs=Slow()), 4, warm=2)<250

def test_measurements_are_listed_and_unknown_ones_named():
    out = bench()
    for o in ('step','views','folder','decode','quality','knn','gpu','imagenette'): assert f'python -m bench {o}' in out
    assert 'no measurement' in bench('speed', rc=1)

def test_a_missing_library_is_left_out_and_said(capsys, monkeypatch):
    from bench import contestants as C
    def missing(): raise ImportError('No module named lightly')
    monkeypatch.setitem(C.registry, 'lightly', missing)
    assert C.available(['plain torch','lightly'])==['plain torch'] and 'lightly is left out' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='no contestant'): C.available(['nobody'])

def test_the_plain_loop_computes_what_fastbyol_computes():
    "Overhead is measured against the same arithmetic: two steps from the same weights end at the same weights"
    from bench import contestants as C
    v1,v2 = noise(8,32),noise(8,32,seed=1)
    plain,ours = C.registry['plain torch, view by view'](),C.registry['fastbyol, fp32'](tau=.996, tau_end=.996, stats=((0.,)*3,(1.,)*3))
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(C, 'body', lambda: deepcopy(plain.online[0])); ours.make(v1, v2, 1)
    m = ours.learn.model
    for a,b in ((m.projector,plain.online[1]), (m.predictor,plain.online[2]), (m.target['projector'],plain.target[1])): a.load_state_dict(b.state_dict())
    ours.times(v1, v2, 1); plain.times(v1, v2, 2)
    for a,b in ((m.body,plain.online[0]), (m.projector,plain.online[1]), (m.predictor,plain.online[2]), (m.target['body'],plain.target[0])):
        for x,y in zip(a.parameters(), b.parameters()): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)

def test_step_writes_what_it_prints(tmp_path):
    out = bench('step', '--size', 32, '--bs', 4, '--steps', 1, '--repeats', 2, '--only', 'plain torch;plain torch, view by view;fastbyol, fp32', '--json', tmp_path/'s.json', '--chart', tmp_path/'s.png')
    res = json.loads((tmp_path/'s.json').read_text())
    assert 'of the floor' in out and res['of floor']['plain torch']==1 and len(res['seconds']['fastbyol, fp32'])==2 and res['command'].startswith('python -m bench step --size 32')
    assert str(tmp_path) not in json.dumps(res) and Image.open(tmp_path/'s.png').size[0]>300

def test_gpu_measures_on_a_cpu_what_it_can(tmp_path, photos):
    file = tmp_path/'g.json'
    out = bench('gpu', photos, '--tiny', '--bs', 4, '--precision', 'fp32', '--json', file)
    res = json.loads(file.read_text())
    wanted = ['photos decoded, a second', 'step with views, not compiled, ms', 'both views, ms', 'step, views given, not compiled, ms', 'optimiser, ms',
              'target update, ms', 'from files each epoch, images/s', 'embeddings and kNN, s']
    assert all(res['figures'][o]>0 for o in wanted) and 'there is no GPU' in out
    gpu_only,lightly = {'busy','compiled_steps'},{'lightly_steps','lightly_from_files'}
    assert gpu_only<={*res['missing']}<=gpu_only|lightly

def test_busy_is_the_union_of_kernels():
    from bench.gpu import busy_and_whole
    cuda_,cpu_ = torch.autograd.DeviceType.CUDA,torch.autograd.DeviceType.CPU
    def event(a, b, dev=cuda_): return SimpleNamespace(time_range=SimpleNamespace(start=a, end=b), device_type=dev)
    kernels = [event(0,10), event(5,20), event(6,7), event(30,40), event(0,99,cpu_)]
    assert busy_and_whole(SimpleNamespace(events=lambda: kernels))==(.03,.04)

@pytest.mark.slow
def test_imagenette_resumes_evaluates_and_shares(tmp_path, photos):
    args,run = ('imagenette', photos, '--tiny', '--out', tmp_path),tmp_path/'2-seed0'
    assert 'to resume' in bench(*args, '--minutes', 0)
    out = bench(*args)
    res = json.loads((run/'figures.json').read_text())
    assert list(res['curve'])==['1','2'] and {'kNN','linear','linear, logistic regression'}<set(res['accuracy'])
    figure = f"{res['accuracy']['kNN']:.1f}"
    assert f"{run}/hub: {figure} %" in out and f"kNN, %: `{figure}`" in (run/'hub/README.md').read_text()
    assert 'kNN' not in bench(*args) # done
    again = bench('imagenette', photos, '--tiny', '--brief', '--out', tmp_path, '--body', run/'body')
    assert f"kNN: {figure} %" in again and (tmp_path/'body/hub/README.md').exists()

@pytest.mark.slow
def test_quality_and_folder_run(tmp_path, photos):
    out = bench('quality', photos, '--seconds', 0, '--epochs', 1, '--seeds', 1, '--size', 16, '--bs', 4, '--only', 'fastbyol', '--json', tmp_path/'q.json')
    assert 'kNN' in out and 0<=json.loads((tmp_path/'q.json').read_text())['runs']['fastbyol'][0]['accuracy']<=1
    assert 'images/s' in bench('folder', photos, '--size', 16, '--bs', 4, '--repeats', 1, '--epochs', 2, '--only', 'fastbyol')
    assert 'at 16 pixels' in bench('views', '--sizes', '16', '--bs', 4, '--batches', 1, '--repeats', 1)
    assert 'images/s of one process' in bench('decode', '--images', 20, '--repeats', 1)

def test_the_numbers_of_a_recipe_follow_the_name():
    from bench.quality import arguments
    assert arguments('fastbyol, lr=1e-3, opt=lars, norm=None')==dict(lr=1e-3, opt='lars', norm=None) and arguments('fastbyol')==arguments('lightly')=={}
    assert arguments('lightly, lr=1')==arguments('fastbyol, fast')==arguments('nobody')==None and 'views' in arguments('fastbyol, views of kornia')
