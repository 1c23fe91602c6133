"The commands: what they write, how they stop and resume, and what they say of bad input"
from conftest import *
from contextlib import redirect_stdout
from filelock import FileLock
from fastbyol import cli, commands, demo
from fastbyol.checkpoint import checkpoints
from fastbyol.data import load_square
import io, json, shlex, shutil, signal, subprocess, sys, threading, time

def photos(path, n=12, classes='ab', size=16):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i,o in enumerate(noise(n, size, seed=k)):
            array = (o.permute(1,2,0)*255*(.5+.5*k)).byte().numpy()
            PILImage.create(array.copy()).save(path/c/f'{i}.png')
    return path

small = ['--arch','test_resnet.r160_in1k','--size',16,'--bs',8,'--precision','fp32']
names = {cli.pretrain:'pretrain', cli.finetune:'finetune', cli.evaluate:'eval', cli.embed:'embed',
         cli.demonstrate:'demo'}

def run(func, *args): return cli.run_command(func, f'fastbyol-{names[func]}', [str(o) for o in args])

def python(code, *args, **env):
    command = [sys.executable, '-c', code, *map(str, args)]
    env = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, errors='replace', timeout=600, env=env)

def body_of(file, arch='test_resnet.r160_in1k', **kwargs):
    model = BYOL(arch, **kwargs)
    model.view_size = 16
    return save_body(model, file)

@pytest.fixture
def data(tmp_path): return photos(tmp_path/'data')

@pytest.fixture(scope='module')
def body_file(tmp_path_factory):
    set_seed(0)
    return body_of(tmp_path_factory.mktemp('body')/'b.safetensors')

def args_of(func, data, out, body_file):
    "The quickest way through each command"
    short = ['--epochs', 1, '--freeze-epochs', 0, '--bs', 8, '--num-workers', 0, '--scratch']
    quick = dict(pretrain=[data, '--epochs', 1, '--out', out, *small],
                 finetune=[body_file, data, *short, '--out', out],
                 eval=[body_file, data, '--steps', 1, '--draws', 1, '--per-class', 1, '--out', out],
                 embed=[body_file, data, out/'e.npz'],
                 demo=['--path', data, '--size', 16, '--epochs', 1, '--bs', 8, '--draws', 1, '--out', out/'d.npz'])
    return quick[names[func]]

# --- what every command does

every = pytest.mark.parametrize('func', names, ids=names.values())

@every
def test_help_names_every_option(func, capsys):
    with pytest.raises(SystemExit) as e: run(func, '--help')
    text = capsys.readouterr().out
    assert e.value.code==0 and text.startswith(f'usage: fastbyol-{names[func]} ')
    for name in inspect.signature(func).parameters: assert name.replace('_','-') in text or name in text, name

def test_help_and_wrong_options_are_answered_without_torch():
    res = python('''
import sys
from fastbyol import cli
for main in ('pretrain_main','finetune_main','eval_main','embed_main','demo_main'):
    for option in ('--help','--nonsense'):
        sys.argv = ['x', option]
        try: getattr(cli, main)()
        except SystemExit as e: assert e.code==(0 if option=='--help' else 2)
assert not {'torch','fastai','numpy'} & set(sys.modules)''')
    assert res.returncode==0, res.stderr
    for name in names.values():
        assert f'usage: fastbyol-{name} ' in res.stdout and f'fastbyol-{name}: error: ' in res.stderr

def test_options_are_spelled_either_way():
    got = []
    def func(x:str, num_workers:int=0, n_in:int=3): got.append((x, num_workers, n_in))
    cli.run_command(func, 'x', ['a_b','--num_workers','2','--n_in=1'])
    cli.run_command(func, 'x', ['a_b','--num-workers','2','--n-in=1'])
    assert got==[('a_b',2,1)]*2

errors = [(ValueError('wrong'),2), (FileNotFoundError('wrong'),2), (KeyboardInterrupt(),130), (None,0)]

@pytest.mark.parametrize('error,code', errors)
def test_exit_codes(error, code, capsys):
    def func():
        if error: raise error
    assert cli.run_command(func, 'x', [])==code
    assert capsys.readouterr().err==('x: wrong\n' if code==2 else '')

def test_importing_everything_prints_nothing():
    res = python('from fastbyol.all import *')
    assert (res.returncode,res.stdout,res.stderr)==(0,'','')

@pytest.mark.parametrize('encoding', ['ascii','cp932'])
def test_no_character_stops_a_command(encoding, tmp_path):
    code = 'from fastbyol.cli import run_command\ndef f():\n    "±τé"\n    print("±τ·é")\n'
    (tmp_path/'odd.py').write_text(code)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    for argv in ([],['--help']):
        code = f'from odd import f,run_command; run_command(f, "x", {argv})'
        res = python(code, PYTHONIOENCODING=encoding, PYTHONPATH=path)
        assert res.returncode==0 and '?' in res.stdout, res.stderr

no_stdout = ['>&-','>/dev/full','| head -n 1'] # closed, on a full disk, a reader that ends

@pytest.mark.skipif(sys.platform!='linux', reason='needs /dev/full')
@pytest.mark.parametrize('func,file', [(cli.pretrain,'body.safetensors'), (cli.evaluate,'eval.png')], ids=['pretrain','eval'])
def test_nobody_has_to_read_what_a_command_says(func, file, data, tmp_path, body_file):
    code,outs = f'from fastbyol.cli import {names[func]}_main as main; main()',[tmp_path/o for o in '012']
    calls = [[sys.executable, '-c', code, *args_of(func, data, o, body_file)] for o in outs]
    lines = [f'{shlex.join(map(str, o))} {to}' for o,to in zip(calls, no_stdout)]
    command = '; '.join(['set -o pipefail', *[f'( {o} ) || exit 1' for o in lines]])
    res = subprocess.run(['bash', '-c', command], capture_output=True, text=True, timeout=600)
    assert res.returncode==0 and 'Error' not in res.stderr and all((o/file).exists() for o in outs), res.stderr

def test_a_folder_is_named_with_its_tab(tmp_path, capsys):
    assert run(cli.pretrain, tmp_path/'pho\ttos')==2
    assert capsys.readouterr().err.startswith(f'fastbyol-pretrain: There is no folder {tmp_path}/pho\ttos')

@pytest.fixture
def odd_names(data):
    "Names of files and of a class that are not UTF-8, and one that is"
    for i,name in enumerate([b'\xff',b'\xc3\xa9']): shutil.move(data/'a'/f'{i}.png', data/'a'/f'{os.fsdecode(name)}.png')
    return shutil.move(data/'b', data/'\udcff').parent

@pytest.mark.skipif(sys.platform!='linux', reason='names of any bytes')
def test_names_may_be_any_bytes(odd_names, tmp_path, body_file):
    code = 'import sys\nfrom fastbyol import cli\nfor line in sys.argv[1:]:' + \
           '\n    name,*args = line.split("\\n")\n    assert cli.run_command(getattr(cli, name), name, args)==0'
    calls = [[o.__name__, *args_of(o, odd_names, tmp_path/'é\udcff'/names[o], body_file)] for o in names]
    calls = ['\n'.join(map(str, o)).replace('d.npz', 'd.png') for o in calls]
    res = python(code, *calls, LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0') # é is no character there, either
    assert res.returncode==0, res.stderr

def weights(model): return {k:v.tolist() for k,v in model.state_dict().items()}

@pytest.fixture
def no_picture(monkeypatch):
    "Leave out what takes long and is tested elsewhere: picture and comparison of the demo"
    def few(*args, **kwargs): return label_efficiency(*args, **{**kwargs, 'steps':1, 'contestants':contestants[:1]})
    def write(learn, res, dls, out): np.savez(out, [o['std'] for o in learn.health.rows], res['mean'])
    monkeypatch.setattr(demo, '_plot_demo', write)
    monkeypatch.setattr(demo, 'label_efficiency', few)

@every
def test_one_seed_gives_the_same_figures_twice(func, data, tmp_path, body_file, no_picture):
    figures = []
    for name in 'ab':
        out = tmp_path/name
        assert run(func, *args_of(func, data, out, body_file))==0
        if func is cli.pretrain: figures.append(weights(load_body(out/'body.safetensors')[0]))
        if func is cli.finetune:
            figures.append([weights(load_learner(out/'model.pkl').model), (out/'report.json').read_text()])
        if func is cli.evaluate: figures.append((out/'eval.json').read_text())
        if func is cli.embed: figures.append(np.load(out/'e.npz')['features'].tolist())
        if func is cli.demonstrate: figures.append([o.tolist() for o in np.load(out/'d.npz').values()])
        torch.rand(3)
    assert figures[0]==figures[1]

@every
def test_a_broken_file_is_left_out_counted_and_named(func, data, tmp_path, body_file, capsys, no_picture):
    whole = (data/'a'/'0.png').read_bytes()
    for c in 'ab': (data/c/'cut.png').write_bytes(whole[:len(whole)//2])
    assert run(func, *args_of(func, data, tmp_path/'out', body_file))==0
    err = capsys.readouterr().err
    assert 'cut.png' in err and 'of 26' in err or err.count('cut.png')>1

work = {cli.pretrain:commands.run_pretrain, cli.finetune:commands.run_finetune, cli.evaluate:commands.run_eval,
        cli.embed:commands.run_embed}

@pytest.mark.parametrize('func', work, ids=[o.__name__ for o in work.values()])
def test_all_options_reach_the_work(func, data, tmp_path, body_file, monkeypatch):
    got = {}
    monkeypatch.setattr(commands, work[func].__name__, lambda opts: got.update(vars(opts)))
    assert run(func, *args_of(func, data, tmp_path/'out', body_file), '--bs', 3)==0
    assert got.keys()==inspect.signature(func).parameters.keys() and got['bs']==3

@pytest.mark.parametrize('func', [cli.pretrain,cli.finetune,cli.evaluate], ids=['pretrain','finetune','eval'])
def test_a_folder_is_marked_and_of_one_job(func, data, tmp_path, body_file, capsys):
    out = tmp_path/'out'
    out.mkdir()
    with FileLock(out/'.lock'): assert run(func, *args_of(func, data, out, body_file))==2 # of another job
    assert 'is in use by' in capsys.readouterr().err and (out/'.fastbyol').exists()
    assert run(func, *args_of(func, data, data, body_file))==2 and '--out' in capsys.readouterr().err

@pytest.mark.parametrize('func', [cli.finetune,cli.evaluate,cli.embed], ids=['finetune','eval','embed'])
def test_a_body_of_channels_that_files_do_not_have_is_refused(func, data, tmp_path, capsys):
    body = body_of(tmp_path/'b2', n_in=2)
    assert run(func, *args_of(func, data, tmp_path/'out', body))==2 and 'got n_in=2' in capsys.readouterr().err

# --- callbacks

def stoppable(tmp_path, *args): return byol_learn(cbs=[CheckpointCallback(tmp_path), commands.StopSignals(), Kill(*args)])

def test_a_signal_ends_the_run_after_its_batch(tmp_path):
    learn,old = stoppable(tmp_path, signal.SIGTERM, 2),signal.getsignal(signal.SIGTERM)
    with learn.stop_signals: learn.fit(5, 1e-3)
    assert (learn.epoch,learn.iter)==(0,1) and signal.getsignal(signal.SIGTERM)==old
    assert learn.stop_signals.exit_code==143
    assert [o.name for o in checkpoints(tmp_path)]==['run001_epoch0000_batch000002.ckpt']

def test_a_second_signal_ends_the_run_at_once(tmp_path):
    learn = stoppable(tmp_path, signal.SIGTERM, 1, 2)
    with pytest.raises(KeyboardInterrupt), learn.stop_signals: learn.fit(1, 1e-3)

def test_a_thread_which_gets_no_signals_trains_as_usual():
    learn,stop = byol_learn(),commands.StopSignals()
    def train():
        with stop: learn.fit(1, 1e-3, cbs=stop)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert len(learn.recorder.values)==1 and stop.handlers=={}

class Kill(Callback):
    "A signal, or several, in the training batch `at`, counted over all fits"
    def __init__(self, sig, at, times=1): self.sig,self.at,self.times,self.n = sig,at,times,0
    def after_batch(self):
        self.n += self.training
        if self.training and self.n==self.at:
            for _ in range(self.times): os.kill(os.getpid(), self.sig)

def logged_fit(file, *epochs):
    learn = byol_learn(cbs=commands._EpochLog(file))
    for n in epochs: learn.fit(n, 1e-9)
    return pd.read_csv(file)

def test_a_log_counts_epochs_over_fits(tmp_path):
    log = logged_fit(tmp_path/'log.csv', 2, 1)
    assert log.epoch.tolist()==[0,1,2] and log.train_loss.notna().all() and 'time' in log

def test_an_epoch_that_is_trained_again_replaces_its_row_and_those_after_it(tmp_path):
    for n in (3,2): assert logged_fit(tmp_path/'log.csv', n).epoch.tolist()==[*range(n)]

def scalars(folder):
    acc = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = acc.EventAccumulator(str(folder))
    events.Reload()
    return {k:sorted({o.step for o in events.Scalars(k)}) for k in events.Tags()['scalars']}

# --- fastbyol-pretrain

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder of photos and a finished run"
    tmp = tmp_path_factory.mktemp('trained')
    data,out = photos(tmp/'data'),tmp/'run'
    with redirect_stdout(io.StringIO()) as text:
        assert run(cli.pretrain, data, '--epochs', 1, '--out', out, '--watch-knn', data, *small)==0
    return data,out,text.getvalue()

@pytest.fixture
def copy(trained, tmp_path):
    "A copy of that run, and its photos in another place"
    for o in trained[:2]: shutil.copytree(o, tmp_path/o.name)
    return tmp_path/'data',tmp_path/'run'

def test_pretrain_writes_a_body_curves_and_logs(trained):
    data,out,text = trained
    for o in ('Nearest neighbours','epoch 1/1','base_lr','The body:'): assert o in text
    body,meta = load_body(out/'body.safetensors')
    assert meta['info']['epochs']==1 and meta['view_size']==16
    assert (out/'curves.png').exists() and checkpoints(out/'checkpoints') and (out/'.fastbyol').exists()
    log = pd.read_csv(out/'log.csv')
    assert log.epoch.tolist()==[0] and {'train_loss','knn','std','rank','time'}<={*log.columns}

def test_tensorboard_gets_every_epoch(trained):
    s = scalars(trained[1]/'tensorboard')
    assert s['train_loss']==s['knn']==s['std']==[0]

def test_a_finished_run_is_left_as_it_is(copy):
    data,out = copy
    def files(): return load_body(out/'body.safetensors')[0].state_dict(),(out/'log.csv').read_text()
    body,log = files()
    assert run(cli.pretrain, data, '--out', out)==0 # photos that moved, and settings that are left out
    assert same_sd(files()[0], body) and files()[1]==log

def test_more_epochs_resume_a_run(copy, capsys):
    data,out = copy
    assert run(cli.pretrain, data, '--out', out, '--epochs', 2)==0
    text = capsys.readouterr().out
    assert 'The run of 1 epochs continues to 2' in text and 'epoch 1/2' not in text and 'epoch 2/2' in text
    assert pd.read_csv(out/'log.csv').epoch.tolist()==[0,1]
    assert load_body(out/'body.safetensors')[1]['info']['epochs']==2

other_settings = [(['--tau','.5'],'tau left out before, 0.5 now'), (['--size','224'],'size 16 before, 224 now'),
    (['--epochs','0'],'epochs 1 before, 0 now'), (['--pretrained'],'pretrained False before')]

@pytest.mark.parametrize('args,says', other_settings)
def test_other_settings_are_refused_for_a_run_that_is_there(trained, capsys, args, says):
    assert run(cli.pretrain, trained[0], '--out', trained[1], *args)==2 and says in capsys.readouterr().err

def test_other_images_are_refused_for_a_run_that_is_there(copy, capsys):
    data,out = copy
    for i in range(4): shutil.copy(data/'a'/'0.png', data/f'{i}.png')
    assert run(cli.pretrain, data, '--out', out)==2
    assert '24 images before, 28 other ones now' in capsys.readouterr().err
    assert run(cli.pretrain, data, '--out', out, '--overwrite', '--epochs', 1, *small)==0

def test_images_on_disk(data, tmp_path, monkeypatch):
    args = ['--epochs', 1, '--out', tmp_path/'run', *small]
    monkeypatch.setenv('FASTBYOL_CACHE', str(tmp_path/'cache'))
    assert run(cli.pretrain, data, '--in-memory', 'disk', *args)==0
    assert any((tmp_path/'cache').iterdir())
    assert run(cli.pretrain, data, '--in-memory', 'yes', *args)==0 # where they are kept is no setting of the run

bad_pretrain = [(['nowhere'],'no folder'), (['--arch','resnet5'],'timm'), (['--epochs','0'],'epochs'),
    (['--bs','4096'],'4096'), (['--preset','x'],'preset'), (['--size','4'],'size'), (['--precision','int8'],'fp32'),
    (['--in-memory','maybe'],'in_memory'), (['--watch-knn','nowhere'],'nowhere'), (['--norm','x'],'norm')]

@pytest.mark.parametrize('args,says', bad_pretrain)
def test_bad_input_is_a_line_and_exit_code_2(data, tmp_path, capsys, args, says):
    folder = tmp_path/args.pop(0) if args[0]=='nowhere' else data
    assert run(cli.pretrain, folder, '--out', tmp_path/'run', *small, *args)==2
    err = capsys.readouterr().err
    assert says in err and err.startswith('fastbyol-pretrain: ') and err.count('\n')==1

def test_a_setting_that_fails_is_not_kept(data, tmp_path):
    args = data, '--epochs', 1, '--out', tmp_path/'run', *small
    assert run(cli.pretrain, *args, '--teacher', 'nothing')==2
    assert run(cli.pretrain, *args)==0

pretrain_code = 'from fastbyol.cli import pretrain_main\npretrain_main()'

def start(*command):
    pipe = subprocess.PIPE
    return subprocess.Popen([str(o) for o in command], stdout=pipe, stderr=pipe, text=True)

def stop_after_two_epochs(process, log, sig):
    def begun(): return log.exists() and len(log.read_text().splitlines())>2
    while process.poll() is None and not begun(): time.sleep(.05)
    process.send_signal(sig)
    _,err = process.communicate(timeout=200)
    assert not (log.parent/'body.safetensors').exists(), err[-2000:]
    assert list((log.parent/'checkpoints').glob('run*.ckpt')), err[-2000:]
    return process.returncode

def logged(out): return pd.read_csv(out/'log.csv')[['epoch','train_loss']].values.tolist()

@pytest.mark.slow
@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, sig):
    data,cut = photos(tmp_path/'data', 100),tmp_path/'cut'
    def args(out): return [str(o) for o in (data, '--epochs', 6, '--out', tmp_path/out, *small)]
    assert python(pretrain_code, *args('whole')).returncode==0
    process = start(sys.executable, '-c', pretrain_code, *args('cut'))
    assert stop_after_two_epochs(process, cut/'log.csv', sig)==(-9 if sig==signal.SIGKILL else 128+sig)
    res = python(pretrain_code, *args('cut'))
    assert res.returncode==0, res.stderr[-2000:]
    assert same_sd(*(load_body(tmp_path/o/'body.safetensors')[0].state_dict() for o in ('whole','cut')))
    assert logged(cut)==logged(tmp_path/'whole')

@pytest.mark.slow
def test_torchrun_pretrains_in_two_processes_and_resumes(tmp_path):
    data,script = photos(tmp_path/'data', 60),tmp_path/'run.py'
    script.write_text(pretrain_code)
    def launch(out):
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, script]
        return start(*torchrun, data, '--epochs', 6, '--out', tmp_path/out, '--watch-knn', data, *small)
    process = launch('whole')
    text,err = process.communicate(timeout=400)
    assert process.returncode==0, err[-2000:]
    for o in ('epoch 6/6','The body:','Nearest neighbours'): assert text.count(o)==1 # one of them speaks
    assert stop_after_two_epochs(launch('cut'), tmp_path/'cut'/'log.csv', signal.SIGTERM)!=0
    process = launch('cut')
    _,err = process.communicate(timeout=400)
    assert process.returncode==0, err[-2000:]
    assert same_sd(*(load_body(tmp_path/o/'body.safetensors')[0].state_dict() for o in ('whole','cut')))
    assert logged(tmp_path/'cut')==logged(tmp_path/'whole')

# --- fastbyol-finetune

def test_finetune_trains_a_classifier_and_one_from_scratch(data, tmp_path, capsys, body_file):
    out = tmp_path/'out'
    args = ['--epochs', 1, '--freeze-epochs', 1, '--bs', 8, '--scratch', '--num-workers', 0]
    assert run(cli.finetune, body_file, data, '--out', out, *args)==0
    text,report = capsys.readouterr().out,json.loads((out/'report.json').read_text())
    assert f"Accuracy {100*report['accuracy_pretrained']:.1f} %" in text and 'Pretraining was worth' in text
    assert report['classes']==2 and report['train']+report['valid']==24
    clas = load_learner(out/'model.pkl')
    assert clas.predict(data/'a'/'0.png')[0] in 'ab'
    assert not clas.cbs.filter(risinstance(commands._EpochLog))
    for name in ('pretrained','scratch'):
        log = pd.read_csv(out/f'log_{name}.csv')
        assert log.epoch.tolist()==[0,1] and log.accuracy.iloc[-1]==pytest.approx(report[f'accuracy_{name}'])
        assert scalars(out/'tensorboard'/name)['accuracy']==[0,1]

def test_finetune_wants_a_body_and_classes(data, tmp_path, capsys, body_file):
    assert run(cli.finetune, tmp_path/'no', data)==2 and 'save_body' in capsys.readouterr().err
    assert run(cli.finetune, body_file, data/'a', '--out', tmp_path/'out')==2
    assert 'folder for each class' in capsys.readouterr().err
    assert run(cli.finetune, body_file, data, '--epochs', 0)==2

# --- fastbyol-eval

def test_eval_tells_what_a_body_is_worth(data, tmp_path, capsys, body_file):
    out = tmp_path/'out'
    args = ['--steps', 2, '--draws', 2, '--per-class', '1,3', '--k', 5]
    assert run(cli.evaluate, body_file, data, '--out', out, *args)==0
    text,res = capsys.readouterr().out,json.loads((out/'eval.json').read_text())
    train,test = split_files(data, .2, 42)
    dls = labelled_dls(train, 16, valid=test)
    assert (res['train'],res['test'],res['classes'])==(len(train),len(test),['a','b'])
    assert res['knn']==pytest.approx(knn_accuracy(body_file, dls.train, dls.valid, 5))
    assert res['linear']==linear_eval(body_file, dls, fast=True, seed=42).top1
    assert res['linear_ci'][0]<=res['linear']<=res['linear_ci'][1]
    rows = {(o['contestant'],o['per_class'],o['n']) for o in res['few_labels']}
    assert rows=={(c,n,2) for c in contestants for n in (1,3)}
    for o in (f"{100*res['knn']:.1f} %", f"{100*res['linear']:.1f} %", 'With 3 labels per class'): assert o in text
    assert Image.open(out/'eval.png').size[0]>1000

def test_eval_takes_a_folder_with_its_split_and_the_papers_protocol(tmp_path, monkeypatch, body_file, no_picture):
    asked = []
    def quick(*args, fast, **kwargs):
        asked.append(fast)
        return linear_eval(*args, fast=True, **kwargs)
    monkeypatch.setattr(commands, 'linear_eval', quick)
    for name,n in (('train',8),('val',4)): photos(tmp_path/'data'/name, n)
    args = ['--steps', 1, '--draws', 1, '--full', '--bs', 4]
    assert run(cli.evaluate, body_file, tmp_path/'data', '--out', tmp_path/'out', *args)==0
    res = json.loads((tmp_path/'out'/'eval.json').read_text())
    assert (res['train'],res['test'],res['linear_by'])==(16,8,'80 epochs') and asked==[False,False]
    assert {o['per_class'] for o in res['few_labels']}=={1,5}

def test_another_body_competes(data, tmp_path, capsys, body_file, no_picture):
    other = body_of(tmp_path/'other.safetensors', 'test_efficientnet.r160_in1k')
    assert run(cli.evaluate, *args_of(cli.evaluate, data, tmp_path/'out', body_file), '--against', other)==0
    rows = json.loads((tmp_path/'out'/'eval.json').read_text())['few_labels']
    assert {f'{other}, linear',f'{other}, fine-tuned'}<={o['contestant'] for o in rows}
    assert str(other) in capsys.readouterr().out

def test_names_are_data(tmp_path, body_file):
    data = photos(tmp_path/'data', 4, ['$5_$10_bill','_background','$'])
    assert run(cli.evaluate, *args_of(cli.evaluate, data, tmp_path/'out', body_file))==0
    assert (tmp_path/'out'/'eval.png').exists()

contestants = ('BYOL, linear','BYOL, fine-tuned','from scratch','pixels, nearest')

verdicts = [([.7,.8,.5,.3],'80.0 %, +30.0 points against training from scratch and +50.0 against bare pixels.'),
    ([.4,.3,.5,.3],'-10.0 points .*: train longer'), ([.7,.8,.5,.9],'-10.0 against bare pixels: train longer')]

@pytest.mark.parametrize('acc,says', verdicts)
def test_the_verdict_says_what_pretraining_was_worth(acc, says):
    rows = [dict(contestant=c, per_class=n, mean=a*n/5) for c,a in zip(contestants, acc) for n in (1,5)]
    assert re.search('With 5 labels.*'+says.replace('+', r'\+'), commands._verdict(pd.DataFrame(rows)))

def test_the_verdict_leaves_competitors_out():
    few = pd.DataFrame(dict(contestant=[*contestants,'BYOL, old, linear'], per_class=1, mean=[.4,.5,.3,.2,.9]))
    assert 'With 1 label per class the pretrained body reaches 50.0 %' in commands._verdict(few)

bad_eval = [(['--per-class','1,99'],'from 1 to'), (['--per-class','a'],'joined by commas'), (['--k','0'],'k'),
    (['--draws','0'],'draws'), (['--valid-pct','2'],'(0,1)'), (['--against','nothing'],'nothing')]

@pytest.mark.parametrize('args,says', bad_eval)
def test_eval_refuses_bad_input_in_a_line(data, tmp_path, capsys, body_file, args, says):
    assert run(cli.evaluate, body_file, data, '--out', tmp_path/'out', *args)==2
    err = capsys.readouterr().err
    assert says in err and err.count('\n')==1 and not (tmp_path/'out').exists()

# --- fastbyol-embed

def embedded(body_file, files):
    encoder = as_encoder(body_file)
    x = torch.stack([load_square(f, 3, 16) for f in files]).float()/255
    with torch.no_grad(): return encoder(encoder.normalize(x)).numpy()

def test_embed_writes_features_with_names(data, tmp_path, capsys, body_file):
    out,files = tmp_path/'deep'/'e.npz',find_images(data)
    assert run(cli.embed, body_file, data, out, '--bs', 5)==0
    o = np.load(out)
    assert o['files'].tolist()==[f.relative_to(data).as_posix() for f in files] and o['features'].dtype==np.float32
    np.testing.assert_allclose(o['features'], embedded(body_file, files), atol=1e-5, rtol=1e-5)
    assert '24 images' in capsys.readouterr().out and [f.name for f in out.parent.iterdir()]==['e.npz']

def test_embed_wants_an_npz(data, tmp_path, capsys, body_file):
    assert run(cli.embed, body_file, data, tmp_path/'o'/'e.csv')==2
    assert '.npz' in capsys.readouterr().err and not (tmp_path/'o').exists()

def test_a_failing_embed_leaves_the_former_file(data, tmp_path, capsys, body_file):
    out = tmp_path/'e.npz'
    out.write_bytes(b'former')
    for f in find_images(data): f.write_bytes(b'no')
    assert run(cli.embed, body_file, data, out)==2 and 'None of the 24' in capsys.readouterr().err
    assert out.read_bytes()==b'former' and not list(tmp_path.glob('.e*'))
