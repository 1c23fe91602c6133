"The commands: what they write, how they stop and go on, and what they say of bad input"
from conftest import *
import json, signal, subprocess, sys, time
from fastbyol import cli

def photos(path, n=24, classes='ab', size=24):
    for k,c in enumerate(classes):
        (path/c).mkdir(parents=True)
        for i,o in enumerate(noise(n, size, seed=k)): PILImage.create((o.permute(1,2,0)*255*(.5+.5*k)).byte().numpy().copy()).save(path/c/f'{i}.png')
    return path

small = ['--arch','test_resnet.r160_in1k','--size','16','--bs','8','--no-bar']

def command(tmp_path, name, *args, **kw):
    "Run a command as a process of its own"
    f = tmp_path/'run.py'; f.write_text(f'from fastbyol.cli import {name}_main\n{name}_main()')
    return subprocess.run([sys.executable, '-W', 'ignore', f, *map(str, args)], capture_output=True, text=True, timeout=600, **kw)

def run(func, *args): return cli.run_command(func, f'fastbyol-{func.__name__}', [str(o) for o in args])

def test_help_is_readable(capsys):
    for f in (cli.pretrain,cli.finetune):
        with pytest.raises(SystemExit) as e: run(f, '--help')
        text = capsys.readouterr().out
        assert e.value.code==0 and f.__doc__.split('.')[0] in ' '.join(text.split())
        for p in inspect.signature(f).parameters.values(): assert p.name.replace('_','-') in text or p.name in text, p.name

def test_options_are_spelled_either_way():
    known = {'--num-workers','--n_in','--bs'}
    assert cli._spelled(['--num_workers','2','--n-in=1','--bs','a_b','x-y','--other_one'], known)==['--num-workers','2','--n_in=1','--bs','a_b','x-y','--other_one']

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

def test_other_settings_are_refused_for_a_run_that_is_there(tmp_path, capsys):
    data,args = photos(tmp_path/'data'),['--epochs', 1, '--out', tmp_path/'run', *small]
    assert run(cli.pretrain, data, *args)==0
    assert run(cli.pretrain, data, *args, '--tau', .5)==2 and 'tau None before, 0.5 now' in capsys.readouterr().err
    assert run(cli.pretrain, data, *args, '--tau', .5, '--overwrite')==0

@pytest.mark.parametrize('args,says', [(['nowhere'],'no folder'), (['--arch','resnet5'],'timm'), (['--epochs','0'],'epochs'), (['--bs','4096'],'4096'), (['--bs','1'],'bs'), (['--preset','x'],'preset'),
    (['--size','4'],'size'), (['--precision','bf16'],'CUDA'), (['--in-memory','maybe'],'in-memory'), (['--tau','2'],'tau'), (['--watch-knn','nowhere'],'nowhere'), (['--norm','x'],'norm')])
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
