"Several processes on the CPU: equal targets on all ranks, and the result of one process"
from conftest import *
import subprocess

script = '''
import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from conftest import *
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
# plain torch around the model: what fastai and accelerate do on top needs `fastbyol.distributed`
torch.set_num_threads(1); default_device(use=False); dist.init_process_group('gloo'); r,n = dist.get_rank(),dist.get_world_size()
set_seed(0); m = small_byol(bn=False); ddp = DDP(m); opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], .5, momentum=.9)
for i in range(6):
    x = m.normalize(noise(8, seed=i)); x = x[r*8//n:(r+1)*8//n]; v = x,mirror(x)
    byol_loss(ddp(*v), m.targets(*v)).backward(); opt.step(); opt.zero_grad(); m.update_target(.9)
torch.save(m.state_dict(), f'{sys.argv[2]}/{n}_{r}.pth')
'''

@pytest.mark.slow
def test_two_processes_have_equal_targets_and_the_weights_of_one(tmp_path):
    (tmp_path/'s.py').write_text(script)
    for n in (1,2):
        res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), tmp_path/'s.py', Path(__file__).parent, tmp_path], capture_output=True, text=True, timeout=300)
        assert res.returncode==0, res.stderr[-2000:]
    one,a,b = (torch.load(tmp_path/f) for f in ('1_0.pth','2_0.pth','2_1.pth'))
    assert same_sd(a, b)
    for k in one: torch.testing.assert_close(a[k], one[k], rtol=1e-4, atol=1e-5)
