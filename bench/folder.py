"""From image files to trained weights: images per second after the first epoch, and the memory that it takes

    python -m bench folder FOLDER              # 640 files of FOLDER, 96 pixels, batches of 32, ResNet-18
    python -m bench folder FOLDER --check --json folder.json --chart folder.png

Each library runs its documented pipeline, decoding, views and steps, in a process of its own, one after another, `--repeats` times. Those with a
data loader run with 0, 1 and 2 workers and the quickest counts. Counted is the time between the end of the first epoch and the end of the last.
Memory is the highest of the process without its workers, with what the library itself imports and no other; what fastbyol keeps of decoded images
is told beside it.
"""
import logging, random, subprocess, sys, time, warnings
from json import dumps, loads
from pathlib import Path

import torch
from fastcore.script import call_parse

from bench.contestants import available, registry
from bench.timing import memory, setting, spread, table, verdict, write

todo = {'fastbyol': (0,), 'fastbyol, optimiser of lightly': (0,), 'fastbyol, fp32': (0,), 'lightly': (0, 1, 2), 'byol-pytorch': (0, 1, 2)}

def one(nm, files, size, bs, epochs, workers):
    "What one run in this process takes"
    torch.manual_seed(0); random.seed(0)
    ends = []
    def tick(n): ends.append(time.perf_counter())
    contestant, started, steps = registry[nm](), memory('VmRSS'), len(files)//bs
    contestant.train(files, size, bs, epochs, tick, workers)
    return dict(images_per_s=bs*steps*(epochs-1)/(ends[-1]-ends[steps-1]), imports_mb=started, peak_mb=memory('VmHWM'))

@call_parse
def main(
    folder:str, # images at any depth
    images:int=640, # of them, spread evenly over the folder
    size:int=96, # side of the views, in pixels
    bs:int=32, # images per batch
    epochs:int=3, # of each run
    repeats:int=3, # runs of each contestant
    only:str=None, # contestants, separated by semicolons; all when left out
    threads:int=None, # threads of torch; torch's own choice when left out
    json:str=None, # file to write the figures to
    chart:str=None, # picture to draw
    check:bool=False, # exit with 1 where a target is missed
    one_of:str=None, # run only this contestant, in this process, on the files named by standard input, and print JSON; what the measurement itself calls
    workers:int=0, # of that run
):
    "Time each library's whole pipeline on image files"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    if threads: torch.set_num_threads(threads)
    if one_of:
        print(dumps(one(one_of, [Path(o) for o in sys.stdin.read().splitlines()], size, bs, epochs, workers)))
        return
    from fastbyol.all import find_images # not in the processes of the others
    files = find_images(folder)
    files = files[::max(1, len(files)//images)][:images]
    if len(files)<2*bs: sys.exit(f'There must be {2*bs} images or more, got {len(files)}')
    names = [o for o in available(only.split(';') if only else list(todo)) if o in todo]
    paths = [o.resolve() for o in files]
    def run(nm, w):
        cmd = [sys.executable, '-W', 'ignore', '-m', 'bench.folder', folder, '--one-of', nm, '--workers', w, '--size', size, '--bs', bs, '--epochs', epochs, *(['--threads', threads] if threads else [])]
        r = subprocess.run([str(o) for o in cmd], input='\n'.join(map(str, paths)), capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        if r.returncode: sys.exit(f'{nm} failed:\n{r.stderr[-3000:]}')
        return loads(r.stdout.strip().splitlines()[-1])
    runs = {(nm, w): [] for nm in names for w in todo[nm]}
    for _ in range(repeats):
        for k in runs: runs[k].append(run(*k))
    label = lambda nm, w: nm if len(todo[nm])==1 else f"{nm}, {w} worker{'s'*(w!=1)}"
    speed, mem = ({label(*k): spread([o[f] for o in r]) for k, r in runs.items()} for f in ('images_per_s', 'peak_mb'))
    kept = len(files)*3*(size*5//4)**2/1e6
    print(f"{len(files)} files, {size} pixels, ResNet-18, batches of {bs}, {torch.get_num_threads()} threads, epochs 2 to {epochs}, median of {repeats} runs\n")
    table(['', 'images/s', 'least', 'most', 'memory, MB'], [[nm, *[f'{o[k]:.1f}' for k in ('median','least','most')], f"{mem[nm]['median']:.0f}"] for nm, o in sorted(speed.items(), key=lambda o: -o[1]['median'])])
    print(f'\nof which decoded images kept in memory by fastbyol: {kept:.0f} MB\n')
    peers, checks = [o for o in speed if o.startswith('lightly')], []
    if peers and 'fastbyol' in speed:
        best = max(peers, key=lambda o: speed[o]['median'])
        checks = [(f'fastbyol, images/s of {best}', speed['fastbyol']['median']/speed[best]['median'], 2.5, False),
                  *[(f'{o}, memory of {best}', (mem[o]['median']-kept)/mem[best]['median'], 1.1, True) for o in ('fastbyol', 'fastbyol, optimiser of lightly') if o in mem]]
    ok = verdict(checks)
    write(dict(setting(size=size, bs=bs, images=len(files), epochs=epochs), kept_mb=kept, runs={label(*k): v for k, v in runs.items()}), json, chart, 'images per second', {nm: tuple(o[k] for k in ('median','least','most')) for nm, o in speed.items()})
    if check and not ok: sys.exit('A target is missed')
