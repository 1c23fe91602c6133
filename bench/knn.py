"""Nearest neighbours: time against a plain chunked matmul and top-k, and the memory of the process

    python -m bench knn                          # 100,000 images in the bank, 10,000 queries, 512 features
    python -m bench knn --json knn.json --check  # write the figures; fail where they are worse than they should be

The plain version multiplies the queries with the bank, a chunk of them at a time, and takes the top k: no lengths, no vote. It runs with
several chunk sizes, and the one that is quickest counts. All run in turns, `--repeats` times; compared are the medians. Memory
is measured in a process of its own that has only the bank, the queries and `knn_predict`.
"""
import statistics, subprocess, sys
from json import dumps, loads
from pathlib import Path

import torch
from fastcore.script import call_parse

from bench.timing import in_turns, memory, seconds, setting, write
from fastbyol.evaluate import knn_predict

max_ratio, max_mb = 1.2, 1500

def features(n, n_queries, dim, n_classes=1000, seed=0):
    "Random bank, its labels, and queries"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=g), torch.randint(0, n_classes, (n,), generator=g), torch.randn(n_queries, dim, generator=g)

def plain(bank, queries, k, chunk):
    "What finding the neighbours takes at the least"
    for q in queries.split(chunk): (q @ bank.T).topk(k)

def measure_memory(n, n_queries, dim, k):
    "What a fresh process that runs `knn_predict` takes, in MB"
    started = memory('VmRSS')
    bank, labels, queries = features(n, n_queries, dim)
    before = memory('VmRSS')
    knn_predict(bank, labels, queries, k)
    return dict(imports_mb=started, with_data_mb=before, peak_mb=memory('VmHWM'))

def measure_time(n, n_queries, dim, k, repeats, chunks):
    "Seconds of each version, by name, a list of `repeats` each"
    bank, labels, queries = features(n, n_queries, dim)
    todo = {'knn_predict': lambda: knn_predict(bank, labels, queries, k)}
    for c in chunks: todo[f'plain, chunks of {c}'] = lambda c=c: plain(bank, queries, k, c)
    return in_turns({nm: (lambda f=f: seconds(f)) for nm, f in todo.items()}, repeats)

@call_parse
def main(
    n:int=100_000, # images in the bank
    queries:int=10_000, # images to classify
    dim:int=512, # features of each
    k:int=20, # neighbours
    repeats:int=5, # times that each version runs
    chunks:str='64,256,1024', # queries at a time of the plain version, separated by commas
    threads:int=None, # threads of torch; torch's own choice when left out
    json:str=None, # file to write the figures to
    check:bool=False, # exit with 1 where the time or the memory is more than it should be
    only_memory:bool=False, # measure the memory of this process and print it as JSON; what the measurement itself calls
):
    "Time `knn_predict` against a plain matmul and top-k, and measure its memory"
    if threads: torch.set_num_threads(threads)
    if only_memory:
        print(dumps(measure_memory(n, queries, dim, k)))
        return
    cmd = [sys.executable, '-m', 'bench.knn', '--only-memory', *[str(o) for nm, v in dict(n=n, queries=queries, dim=dim, k=k).items() for o in (f'--{nm}', v)]]
    if threads: cmd += ['--threads', str(threads)]
    mem = loads(subprocess.run(cmd, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout)
    runs = measure_time(n, queries, dim, k, repeats, [int(o) for o in chunks.split(',')])
    medians = {nm: statistics.median(o) for nm, o in runs.items()}
    ours = medians.pop('knn_predict')
    best = min(medians, key=medians.get)
    res = setting(n=n, queries=queries, dim=dim, k=k, repeats=repeats, seconds=runs, median_s=dict(knn_predict=ours, **medians), ratio=ours/medians[best], bank_mb=n*dim*4/1e6, **mem)
    print(f"{n:,} × {dim} bank ({res['bank_mb']:.0f} MB), {queries:,} queries, k={k}, {repeats} repeats, {res['threads']} thread{'s'*(res['threads']>1)}\n")
    for nm, o in res['median_s'].items(): print(f"{nm:<24} {o:7.2f} s  (of {min(runs[nm]):.2f} to {max(runs[nm]):.2f})")
    print(f"\n{'ratio to the quickest':<24} {res['ratio']:7.2f}    (at most {max_ratio})")
    for nm, t in (('imports_mb','after the imports'), ('with_data_mb','with bank and queries'), ('peak_mb','at the highest')):
        print(f"{t:<24} {mem[nm]:7.0f} MB" + (f" (less than {max_mb})" if nm=='peak_mb' else ''))
    write(res, json)
    if check and (res['ratio']>max_ratio or mem['peak_mb']>=max_mb): sys.exit('More time or memory than it should take')
