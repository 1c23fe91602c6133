"What all measurements share: turns, the machine, tables, files"
import os, platform, re, resource, shlex, statistics, sys, time
from datetime import date
from json import dumps
from pathlib import Path

import torch

def seconds(f):
    "How long one call of `f` takes"
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def in_turns(todo, repeats):
    "Call each of `todo` (name -> function that returns a figure or a list of them) in turns, once to warm up; name -> figures"
    runs = {nm: [] for nm in todo}
    for i in range(repeats+1):
        for nm, f in todo.items():
            r = f()
            if i: runs[nm] += r if isinstance(r, list) else [r]
    return runs

def memory(key):
    "Resident memory of this process in MB (10⁶ bytes): now ('VmRSS') or at its highest ('VmHWM')"
    try: return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])*1024/1e6
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform=='darwin' else 1e3) # only the highest

def cpu_name():
    "The processor, as the system calls it"
    try: return re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())[1].strip()
    except (OSError, TypeError): return platform.processor() or platform.machine()

def command():
    "How this was called, without the folders of this machine"
    return 'python -m bench ' + shlex.join([Path(sys.argv[0]).stem, *[Path(o).name if os.sep in o else o for o in sys.argv[1:]]])

def setting(**kw):
    "Where and when: goes into every file"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(date=date.today().isoformat(), command=command(), cpu=cpu_name(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__, **kw)

def spread(figures):
    "Median, least and greatest"
    return dict(median=statistics.median(figures), least=min(figures), most=max(figures), n=len(figures))

def table(head, rows):
    "Print rows of strings under `head`, the first column to the left"
    rows = [head, *rows]
    ws = [max(len(r[i]) for r in rows) for i in range(len(head))]
    for r in rows: print(r[0].ljust(ws[0]), *[o.rjust(w) for o, w in zip(r[1:], ws[1:])], sep='  ')

def write(res, json=None, chart=None, unit='', bars=None):
    "Write the figures as JSON and as a bar chart of `bars` (name -> (median, least, most))"
    if json: Path(json).write_text(dumps(res, indent=1)+'\n')
    if not chart: return
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names = list(bars)[::-1]
    fig, ax = plt.subplots(figsize=(6, .45*len(names)+.9))
    mid = [bars[o][0] for o in names]
    ax.barh(names, mid, xerr=[[m-bars[o][1] for o, m in zip(names, mid)], [bars[o][2]-m for o, m in zip(names, mid)]],
            color=['#2a6f97' if o.startswith('fastbyol') else '#b0b7bf' for o in names], error_kw=dict(lw=1, ecolor='#555'))
    ax.set_xlabel(unit); ax.spines[['top','right']].set_visible(False)
    fig.tight_layout(); fig.savefig(chart, dpi=110)

def verdict(checks):
    "Print each target (name, reached, test, wanted) and return whether all hold"
    ok = True
    for nm, got, wanted, most in checks:
        good = got<=wanted if most else got>=wanted
        ok &= good
        print(f"{nm:<66} {got:6.2f}  ({'at most' if most else 'at least'} {wanted}) {'' if good else '  NOT REACHED'}")
    return ok
