"The commands: what they write, how they stop and go on, and what they say of bad input"
from conftest import *
from fastbyol.data import load_square
from fastbyol.explore import embed_images
from fastbyol.demo import main
import json, signal, subprocess, sys, time
from fastbyol import cli

def photos(path, n=24, classes='ab', size=24):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i,o in enumerate(noise(n, size, seed=k)): PILImage.create((o.permute(1,2,0)*255*(.5+.5*k)).byte().numpy().copy()).save(path/c/f'{i}.png')
    return path

small = ['--arch','test_resnet.r160_in1k','--size','16','--bs','8','--no-bar','--precision','fp32']

def command(tmp_path, name, *args, **kw):
    "Run a command as a process of its own"
    f = tmp_path/'run.py'; f.write_text(f'from fastbyol.cli import {name}_main\n{name}_main()')
    return subprocess.run([sys.executable, '-W', 'ignore', f, *map(str, args)], capture_output=True, text=True, timeout=600, **kw)

def run(func, *args): return cli.run_command(func, f'fastbyol-{func.__name__}', [str(o) for o in args])

def test_help_is_readable(capsys):
    for f in (cli.pretrain,cli.finetune,cli.evaluate,cli.embed):
        with pytest.raises(SystemExit) as e: run(f, '--help')
        text = capsys.readouterr().out
        assert e.value.code==0 and f.__doc__.split('.')[0] in ' '.join(text.split())
        for p in inspect.signature(f).parameters.values(): assert p.name.replace('_','-') in text or p.name in text, p.name

@pytest.mark.parametrize('main', ['pretrain_main','finetune_main','eval_main','embed_main'])
def test_commands_know_their_own_names(main, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x', '--help'])
    with pytest.raises(SystemExit) as e: getattr(cli, main)()
    assert not e.value.code and capsys.readouterr().out.startswith(f'usage: fastbyol-{main.removesuffix("_main")} ')

def test_the_picture_of_an_evaluation():
    y = [i%2 for i in range(24)]; dls = image_dls(noise(24), y=y); model = small_byol()
    few = label_efficiency(model, dls, per_class=(1,2), seeds=1, contestants=('BYOL, linear','pixels, nearest'))
    fig = cli.plot_eval({'kNN':(.9,.5), 'linear':(.8,.4)}, few, embed_images(model, dls.valid)); a,b,c = fig.axes[:3]
    assert [round(o.get_height()) for o in a.patches]==[90,80,50,40] and {o.get_text() for o in b.get_legend().get_texts()}=={'BYOL, linear','pixels, nearest'} and c.get_children()
    plt.close('all')

def test_options_are_spelled_either_way():
    known = {'--num-workers','--n_in','--bs'}
    assert cli._spelled(['--num_workers','2','--n-in=1','--bs','a_b','x-y','--other_one'], known)==['--num-workers','2','--n_in=1','--bs','a_b','x-y','--other_one']

def test_a_line_for_each_epoch(capsys, tmp_path):
    cli.epoch_line(['epoch','train_loss','valid_loss','knn','time'], 3)([0, 1.23456, None, float('nan'), '00:01'])
    assert capsys.readouterr().out=='epoch 1/3  train_loss 1.235  time 00:01\n'
    learn = byol_learn(cbs=cli.JsonLines(tmp_path/'a'/'log.jsonl')); learn.fit(2, 1e-3); learn.validate()
    rows = [json.loads(o) for o in (tmp_path/'a'/'log.jsonl').read_text().splitlines()]
    assert [o['epoch'] for o in rows]==[1,2] and all(o['lr']==1e-3 and o['train_loss']>0 for o in rows)

def test_a_signal_ends_the_run_after_its_batch(tmp_path):
    saved,old = [],signal.getsignal(signal.SIGTERM)
    class Kill(Callback):
        def after_batch(self):
            if self.iter==1: os.kill(os.getpid(), signal.SIGTERM)
    learn = byol_learn(cbs=[cli.StopSignals(lambda: saved.append(1)), Kill()]); learn.fit(5, 1e-3)
    assert saved==[1] and learn.iter<=2 and learn.epoch==0 and signal.getsignal(signal.SIGTERM)==old

def test_pretrain_then_finetune(tmp_path, capsys):
    data,out = photos(tmp_path/'data'),tmp_path/'run'
    assert run(cli.pretrain, data, '--epochs', 2, '--out', out, '--watch-knn', data, *small)==0
    text = capsys.readouterr().out
    assert 'Nearest neighbours' in text and 'epoch 2/2' in text and 'base_lr' in text
    log = [json.loads(o) for o in (out/'log.jsonl').read_text().splitlines()]
    assert [o['epoch'] for o in log]==[1,2] and {'train_loss','knn','std','rank','lr','tau','seconds','time'}<=log[0].keys()
    body,meta = load_body(out/'body.safetensors')
    assert meta['info']['epochs']==2 and meta['view_size']==16 and (out/'curves.png').exists() and (out/'checkpoints'/'best.ckpt').exists()
    assert run(cli.finetune, out/'body.safetensors', data, '--out', tmp_path/'clas', '--epochs', 1, '--freeze-epochs', 1, '--bs', 8, '--scratch', '--no-bar')==0
    text,report = capsys.readouterr().out,json.loads((tmp_path/'clas'/'report.json').read_text())
    assert f"Accuracy {100*report['accuracy_pretrained']:.1f} %" in text and 'Pretraining was worth' in text and report['classes']==2 and report['train']+report['valid']==48
    clas = load_learner(tmp_path/'clas'/'model.pkl')
    assert clas.predict(data/'a'/'0.png')[0] in 'ab' and [json.loads(o)['epoch'] for o in (tmp_path/'clas'/'log.jsonl').read_text().splitlines()]==[1,2]

def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    data,args = photos(tmp_path/'data'),['--epochs', 1, '--out', tmp_path/'run', *small]
    run(cli.pretrain, data, *args); first_ = load_body(tmp_path/'run'/'body.safetensors')[0].state_dict(); log = (tmp_path/'run'/'log.jsonl').read_text()
    assert run(cli.pretrain, data, *args)==0
    assert same_sd(first_, load_body(tmp_path/'run'/'body.safetensors')[0].state_dict()) and (tmp_path/'run'/'log.jsonl').read_text()==log

def test_images_on_disk(tmp_path):
    data,cache = photos(tmp_path/'data'),tmp_path/'cache'
    args = ['--epochs', 1, '--out', tmp_path/'run', '--in-memory', 'disk', '--cache-dir', cache, *small]
    assert run(cli.pretrain, data, *args)==0 and len(list(cache.glob('*.images')))==1
    assert run(cli.pretrain, data, *args[:-2], '--precision','fp32', '--in-memory','yes')==0 # where they are kept is no setting of the run

def test_other_settings_are_refused_for_a_run_that_is_there(tmp_path, capsys):
    data,args = photos(tmp_path/'data'),['--epochs', 1, '--out', tmp_path/'run', *small]
    assert run(cli.pretrain, data, *args)==0
    assert run(cli.pretrain, data, *args, '--tau', .5)==2 and 'tau None before, 0.5 now' in capsys.readouterr().err
    assert run(cli.pretrain, data, *args, '--tau', .5, '--overwrite')==0

@pytest.mark.parametrize('args,says', [(['nowhere'],'no folder'), (['--arch','resnet5'],'timm'), (['--epochs','0'],'epochs'), (['--bs','4096'],'4096'), (['--bs','1'],'bs'), (['--preset','x'],'preset'),
    (['--size','4'],'size'), (['--precision','fp16'],'GPU'), (['--precision','int8'],'fp32'), (['--in-memory','maybe'],'in-memory'), (['--tau','2'],'tau'), (['--watch-knn','nowhere'],'nowhere'), (['--norm','x'],'norm')])
def test_bad_input_is_a_line_and_exit_code_2(tmp_path, capsys, args, says):
    data = photos(tmp_path/'data', 8); base = [tmp_path/args.pop(0) if args[0]=='nowhere' else data, '--out', tmp_path/'run', *small]
    assert run(cli.pretrain, *base, *args)==2
    err = capsys.readouterr().err
    assert says in err and err.startswith('fastbyol-pretrain: ') and err.count('\n')==1

def test_finetune_wants_a_body_and_classes(tmp_path, capsys):
    data = photos(tmp_path/'data', 8)
    assert run(cli.finetune, tmp_path/'no', data)==2 and 'save_body' in capsys.readouterr().err
    save_body(BYOL('test_resnet.r160_in1k'), tmp_path/'b')
    assert run(cli.finetune, tmp_path/'b', data/'a')==2 and 'folder for each class' in capsys.readouterr().err
    assert run(cli.finetune, tmp_path/'b', data, '--epochs', 0)==2

def stopped(tmp_path, sig, wait, *args):
    f = tmp_path/'run.py'; f.write_text('from fastbyol.cli import pretrain_main\npretrain_main()')
    p = subprocess.Popen([sys.executable, '-W', 'ignore', f, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not wait() and p.poll() is None: time.sleep(.05)
    p.send_signal(sig)
    out,err = p.communicate(timeout=120)
    return p.returncode,out,err

@pytest.mark.slow
@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, sig):
    data = photos(tmp_path/'data', 100); assert len(find_images(data))==200
    args = lambda out: [data, '--epochs', 6, '--out', tmp_path/out, *small]
    assert command(tmp_path, 'pretrain', *args('whole')).returncode==0
    log = tmp_path/'cut'/'log.jsonl'
    code,out,err = stopped(tmp_path, sig, lambda: log.exists() and len(log.read_text().splitlines())>=2, *args('cut'))
    assert code==(-9 if sig==signal.SIGKILL else 128+sig), err
    assert not (tmp_path/'cut'/'body.safetensors').exists() and list((tmp_path/'cut'/'checkpoints').glob('run*.ckpt'))
    res = command(tmp_path, 'pretrain', *args('cut')); assert res.returncode==0, res.stderr[-2000:]
    assert same_sd(*(load_body(tmp_path/o/'body.safetensors')[0].state_dict() for o in ('whole','cut')))
    assert [json.loads(o)['epoch'] for o in log.read_text().splitlines()]==[1,2,3,4,5,6]
    res = command(tmp_path, 'finetune', tmp_path/'cut'/'body.safetensors', data, '--epochs', 1, '--out', tmp_path/'clas', '--no-bar')
    assert res.returncode==0 and 'Accuracy' in res.stdout

class Kill(Callback):
    "A signal in the training batch `at`, counted over all fits"
    def __init__(self, sig, at): self.sig,self.at,self.n = sig,at,0
    def after_batch(self):
        self.n += self.training
        if self.training and self.n==self.at: os.kill(os.getpid(), self.sig)

@pytest.mark.parametrize('sig,at', [(signal.SIGTERM,1), (signal.SIGINT,12)], ids=['frozen','unfrozen'])
def test_a_stopped_finetune_leaves_a_classifier_of_what_was_trained(tmp_path, capsys, monkeypatch, body_file, sig, at):
    data,out,show = photos(tmp_path/'data'),tmp_path/'deep'/'o',cli._show
    monkeypatch.setattr(cli, '_show', lambda learn, *a: (show(learn, *a), learn.add_cb(Kill(sig, at))))
    assert run(cli.finetune, body_file, data, '--out', out, '--epochs', 1, '--freeze-epochs', 1, '--bs', 4, '--no-bar', '--scratch', '--num-workers', 0)==128+sig
    text,report = capsys.readouterr().out,json.loads((out/'report.json').read_text())
    assert 'Stopped before the end' in text and report['stopped']=='pretrained' and f"{100*report['accuracy_pretrained']:.1f} %" in text and 'worth' not in text
    assert load_learner(out/'model.pkl').predict(data/'a'/'0.png')[0] in 'ab' and (out/'log.jsonl').exists()==(at==12) and not (out/'log_scratch.jsonl').exists()

def test_a_finetune_stopped_in_its_comparison_keeps_its_classifier(tmp_path, capsys, monkeypatch, body_file):
    data,out,show,kill = photos(tmp_path/'data', 8),tmp_path/'o',cli._show,Kill(signal.SIGTERM, 8)
    monkeypatch.setattr(cli, '_show', lambda learn, *a: (show(learn, *a), learn.add_cb(kill))) # of both learners
    assert run(cli.finetune, body_file, data, '--out', out, '--epochs', 1, '--freeze-epochs', 1, '--bs', 4, '--no-bar', '--scratch', '--num-workers', 0)==143
    report = json.loads((out/'report.json').read_text()); assert report['stopped']=='scratch' and 'accuracy_scratch' not in report and (out/'model.pkl').exists()

# --- several processes

@pytest.mark.slow
@pytest.mark.parametrize('sig', [None, signal.SIGTERM])
def test_torchrun_pretrains_in_two_processes_and_goes_on(tmp_path, sig):
    data,f = photos(tmp_path/'data', 60),tmp_path/'run.py'; f.write_text('from fastbyol.cli import pretrain_main\npretrain_main()')
    def start(out): return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', f, data, '--epochs', '6', '--out', tmp_path/out, '--watch-knn', data, *small],
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    p = start('whole'); text,err = p.communicate(timeout=400); assert p.returncode==0, err[-2000:]
    assert text.count('epoch 6/6')==1 and text.count('The body:')==1 and text.count('Nearest neighbours')==1 # one of them speaks
    log = lambda out: [json.loads(o) for o in (tmp_path/out/'log.jsonl').read_text().splitlines()]
    assert [o['epoch'] for o in log('whole')]==[1,2,3,4,5,6]
    if sig is None: return
    p = start('cut'); file = tmp_path/'cut'/'log.jsonl'
    while p.poll() is None and not (file.exists() and len(file.read_text().splitlines())>=2): time.sleep(.05)
    p.send_signal(sig); _,err = p.communicate(timeout=200)
    assert p.returncode!=0 and not (tmp_path/'cut'/'body.safetensors').exists() and list((tmp_path/'cut'/'checkpoints').glob('run*.ckpt')), err[-2000:]
    p = start('cut'); _,err = p.communicate(timeout=400); assert p.returncode==0, err[-2000:]
    assert same_sd(*(load_body(tmp_path/o/'body.safetensors')[0].state_dict() for o in ('whole','cut')))
    assert [o['train_loss'] for o in log('cut')]==[o['train_loss'] for o in log('whole')]

# --- fastbyol-eval

@pytest.fixture(scope='module')
def body_file(tmp_path_factory):
    set_seed(0); return save_body(BYOL('test_resnet.r160_in1k'), tmp_path_factory.mktemp('body')/'b', view_size=16)

def test_eval_tells_what_a_body_is_worth(tmp_path, capsys, body_file):
    data,out = photos(tmp_path/'data'),tmp_path/'ev'
    assert run(cli.evaluate, body_file, data, '--out', out, '--steps', 3, '--draws', 2, '--per-class', '1,3', '--size', 16, '--k', 5)==0
    text,res = capsys.readouterr().out,json.loads((out/'eval.json').read_text())
    train,test = split_files(data, .2, 42); dls = labelled_dls(train, 16, valid=test)
    assert (res['train'],res['test'],res['classes'])==(len(train),len(test),['a','b']) and res['knn']==pytest.approx(knn_accuracy(body_file, dls.train, dls.valid, 5))
    assert res['linear']==linear_eval(body_file, dls, fast=True, seed=42).top1 and res['linear_ci'][0]<=res['linear']<=res['linear_ci'][1]
    assert {(o['contestant'],o['per_class'],o['n']) for o in res['few_labels']}=={(c,n,2) for c in ('BYOL, linear','BYOL, fine-tuned','from scratch','pixels, nearest') for n in (1,3)}
    assert f"{100*res['knn']:.1f} %" in text and f"{100*res['linear']:.1f} %" in text and 'from scratch' in text and 'With 3 labels per class' in text
    im = Image.open(out/'eval.png'); assert im.size[0]>1000 and len(np.unique(np.asarray(im.convert('L'))))>50

def test_eval_takes_a_folder_with_its_own_split_and_the_papers_protocol(tmp_path, capsys, body_file):
    data = tmp_path/'data'; photos(data/'train', 8); photos(data/'val', 4)
    assert run(cli.evaluate, body_file, data, '--out', tmp_path/'ev', '--steps', 2, '--draws', 1, '--full', '--bs', 4, '--size', 16)==0
    res = json.loads((tmp_path/'ev'/'eval.json').read_text()); assert (res['train'],res['test'],res['linear_by'])==(16,8,'80 epochs') and {o['per_class'] for o in res['few_labels']}=={1,5}
    assert '(80 epochs)' in capsys.readouterr().out

def few(**acc): return pd.DataFrame([dict(contestant=c, per_class=n, mean=a) for c,a in zip(('BYOL, linear','BYOL, fine-tuned','from scratch','pixels, nearest'), acc.values()) for n in (1,5)])
def test_the_verdict_says_what_pretraining_was_worth():
    assert 'reaches 80.0 % (fine-tuned), training from scratch 50.0 %: pretraining was worth 30.0 points.' in cli._verdict(few(a=.7,b=.8,c=.5,d=.3)) and 'pixels' not in cli._verdict(few(a=.7,b=.8,c=.5,d=.3))
    assert 'did not help' in cli._verdict(few(a=.4,b=.3,c=.5,d=.3)) and 'bare pixels reaches 90.0 %' in cli._verdict(few(a=.7,b=.8,c=.5,d=.9)) and 'With 5 labels' in cli._verdict(few(a=.4,b=.3,c=.5,d=.3))

@pytest.mark.parametrize('args,says', [(['--per-class','1,99'],'from 1 to 6'), (['--per-class','a'],'separated by commas'), (['--k','0'],'k'), (['--draws','0'],'draws'), (['--valid-pct','2'],'(0,1)')])
def test_eval_refuses_bad_input_in_a_line(tmp_path, capsys, body_file, args, says):
    assert run(cli.evaluate, body_file, photos(tmp_path/'data', 8), '--out', tmp_path/'ev', *args)==2
    err = capsys.readouterr().err; assert says in err and err.count('\n')==1 and not (tmp_path/'ev').exists()

def test_folders_too_large_for_memory_are_read_from_disk(tmp_path, monkeypatch, body_file):
    data = photos(tmp_path/'data', 8); a = cli._loaders_to_look(data, 16, 4, 3, .25, 0)
    monkeypatch.setattr(cli, '_free_memory', lambda: 1000); b = cli._loaders_to_look(data, 16, 4, 3, .25, 0, 0)
    assert isinstance(a.train.dataset, list) and hasattr(b.train_ds, 'items') and (len(a.train.dataset),len(a.valid.dataset))==(len(b.train_ds),len(b.valid_ds))
    for x,y in zip(get_embeddings(body_file, a.valid), get_embeddings(body_file, b.valid)): torch.testing.assert_close(x, y, rtol=.05, atol=.05)

@pytest.mark.parametrize('f', [cli.finetune,cli.evaluate,cli.embed])
def test_a_body_of_channels_that_files_do_not_have_is_refused(tmp_path, capsys, f):
    body = save_body(BYOL('test_resnet.r160_in1k', n_in=2), tmp_path/'b2'); out = [tmp_path/'e.npz'] if f is cli.embed else ['--out',tmp_path/'o']
    assert run(f, body, photos(tmp_path/'data', 4), *out)==2 and 'images of 2 channels' in capsys.readouterr().err

# --- fastbyol-embed

def embedded(body_file, files, size=16):
    m,meta = load_body(body_file); x = torch.stack([load_square(f, 3, size) for f in files]).float()/255; mean,std = (tensor(o).view(1,-1,1,1) for o in meta.spec.stats)
    with torch.no_grad(): return pool_features(m((x-mean)/std), meta.spec.nhwc)

@pytest.mark.parametrize('args,tol', [([],1e-5), (['--dtype','float16','--num-workers','2'],1e-2)])
def test_embed_writes_features_with_names(tmp_path, capsys, body_file, args, tol):
    data,out = photos(tmp_path/'data', 7),tmp_path/'deep'/'e.npz'; (data/'a'/'bad.png').write_bytes(b'no')
    assert run(cli.embed, body_file, data, out, '--bs', 4, '--size', 16, *args)==0
    o,files = np.load(out),[f for f in find_images(data) if f.name!='bad.png']
    assert o['files'].tolist()==[f.relative_to(data).as_posix() for f in files] and o['features'].dtype==(np.float16 if args else np.float32)
    np.testing.assert_allclose(o['features'], embedded(body_file, files), atol=tol, rtol=tol)
    c = capsys.readouterr(); assert '14 images' in c.out and '1 of 15 files' in c.err and 'bad.png' in c.err and [f.name for f in out.parent.iterdir()]==['e.npz']

def test_embed_writes_parquet(tmp_path, body_file):
    pd_ = pytest.importorskip('pyarrow.parquet'); data = photos(tmp_path/'data', 7)
    assert run(cli.embed, body_file, data, tmp_path/'e.parquet', '--bs', 4, '--size', 16)==0
    t = pd_.read_table(tmp_path/'e.parquet'); files = find_images(data); assert t['file'].to_pylist()==[f.relative_to(data).as_posix() for f in files]
    np.testing.assert_allclose(np.stack(t['features'].to_pylist()), embedded(body_file, files), atol=1e-5, rtol=1e-4)

def test_parquet_without_pyarrow_is_refused_at_once(tmp_path, capsys, monkeypatch, body_file):
    find = cli.importlib.util.find_spec; monkeypatch.setattr(cli.importlib.util, 'find_spec', lambda n: None if n=='pyarrow' else find(n))
    assert run(cli.embed, body_file, photos(tmp_path/'data', 2), tmp_path/'e.parquet')==2 and 'pip install pyarrow' in capsys.readouterr().err

@pytest.mark.parametrize('out,args,says', [('e.csv',[],'.npz'), ('e.npz',['--dtype','int8'],'float16'), ('e.npz',['--bs','0'],'bs')])
def test_embed_refuses_bad_input(tmp_path, capsys, body_file, out, args, says):
    assert run(cli.embed, body_file, photos(tmp_path/'data', 2), tmp_path/'o'/out, *args)==2 and says in capsys.readouterr().err and not (tmp_path/'o').exists()

def test_a_failing_embed_leaves_the_former_file(tmp_path, capsys, body_file):
    data,out = tmp_path/'data',tmp_path/'e.npz'; photos(data, 2); run(cli.embed, body_file, data, out, '--size', 16); before = out.read_bytes()
    for f in find_images(data): f.write_bytes(b'no')
    assert run(cli.embed, body_file, data, out, '--size', 16)==2 and 'None of the 4' in capsys.readouterr().err and out.read_bytes()==before and not list(tmp_path.glob('.e*'))

def test_embedding_many_images_takes_the_memory_of_few(tmp_path, body_file, monkeypatch):
    "Rows go to disk as they come: 40 MB of features, and a rise of much less"
    im = torch.zeros(3,16,16,dtype=torch.uint8); monkeypatch.setattr(cli, 'find_images', lambda p: [Path(p)/f'{i}.png' for i in range(5000)]); monkeypatch.setattr(cli, 'load_square', lambda *a: im)
    monkeypatch.setattr(cli, '_embedder', lambda *a: (None, lambda x: torch.rand(len(x), 2048), lambda x: x))
    rise = peak_mib(lambda: run(cli.embed, body_file, tmp_path, tmp_path/'e.npz', '--size', 16, '--num-workers', 0))
    assert (tmp_path/'e.npz').stat().st_size>5000*2048*4 and rise<25

# --- TensorBoard

def test_tensorboard_gets_every_step_and_every_epoch(tmp_path, capsys):
    acc = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator'); data = photos(tmp_path/'data')
    def steps(f): e = acc.EventAccumulator(str(f/'tensorboard')); e.Reload(); return {k:[o.step for o in e.Scalars(k)] for k in e.Tags()['scalars']}
    assert run(cli.pretrain, data, '--epochs', 2, '--out', tmp_path/'run', '--watch-knn', data, *small)==0 # with LARS
    s = steps(tmp_path/'run'); assert s['train_loss']==s['lr']==s['tau']==list(range(12)) and s['epoch/knn']==s['epoch/std']==[5,11]
    assert run(cli.finetune, tmp_path/'run'/'body.safetensors', data, '--out', tmp_path/'c', '--epochs', 1, '--freeze-epochs', 1, '--bs', 8, '--no-bar')==0
    s = steps(tmp_path/'c'); n = len(s['train_loss']); assert s['train_loss']==list(range(n)) and s['epoch/accuracy']==s['epoch/train_loss']==[n//2-1,n-1]
    e = acc.EventAccumulator(str(tmp_path/'c'/'tensorboard')); e.Reload(); log = [json.loads(o) for o in (tmp_path/'c'/'log.jsonl').read_text().splitlines()]
    for k in ('train_loss','valid_loss','accuracy'): np.testing.assert_allclose([o.value for o in e.Scalars(f'epoch/{k}')], [o[k] for o in log], rtol=1e-5) # nothing of `validate`
    assert not load_learner(tmp_path/'c'/'model.pkl').cbs.filter(risinstance((cli.StopSignals,cli.JsonLines,cli.TensorBoard)))

def test_validating_after_a_fit_that_was_cut_short_writes_nothing(tmp_path):
    pytest.importorskip('tensorboard')
    class Cut(Callback):
        def after_batch(self):
            if self.epoch==1: raise CancelFitException
    learn = byol_learn(cbs=[cli.JsonLines(tmp_path/'log.jsonl'), cli.TensorBoard(tmp_path/'t'), Cut()]); points = []; learn.tensor_board._write = lambda vals: points.append(vals)
    learn.fit(3, 1e-3); learn.remove_cb(Cut); learn.validate()
    rows = [json.loads(o) for o in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert [o['epoch'] for o in rows]==[1] and [o.keys() for o in points]==[{'train_loss','valid_loss'}]
