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

eman_script = '''
import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])
from conftest import *
import torch.distributed as dist
torch.set_num_threads(1); default_device(use=False); dist.init_process_group('gloo'); r,n = dist.get_rank(),dist.get_world_size()
set_seed(0)
learn = byol_learn(image_dls(noise(40, seed=r)), small_byol(target_bn='eman')) # other images in each process, and batch norm that is not synchronised
class AverageGradients(Callback): # what `DistributedDataParallel` does
    order = 5
    def before_step(self):
        for p in self.model.parameters():
            if p.grad is not None: dist.all_reduce(p.grad); p.grad /= n
learn.fit(2, .05, cbs=AverageGradients())
torch.save(learn.model.state_dict(), f'{sys.argv[2]}/{r}.pth')
'''

@pytest.mark.slow
def test_averaged_statistics_are_equal_in_all_processes(tmp_path):
    (tmp_path/'s.py').write_text(eman_script)
    res = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', tmp_path/'s.py', Path(__file__).parent, tmp_path], capture_output=True, text=True, timeout=300)
    assert res.returncode==0, res.stderr[-2000:]
    a,b = (torch.load(tmp_path/f'{r}.pth') for r in range(2)); t = [k for k in a if k.startswith('target')]
    assert all(torch.equal(a[k], b[k]) for k in t) and any('running' in k for k in t)
    assert any(not torch.equal(a[k], b[k]) for k in a if 'running' in k) # the online network's are each process's own
