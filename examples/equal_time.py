"""What the same minutes give: BYOL alone, with a teacher, with views that grow over the run, or of the middle of photos

    python examples/equal_time.py FOLDER                    # FOLDER has a folder for each class, or train/ and val/ with such folders
    python examples/equal_time.py FOLDER --weights FILE     # the teacher's published weights from a local file
    python examples/equal_time.py FOLDER --only 'alone;growing views' --minutes 12
    python examples/equal_time.py FOLDER --wide --only 'alone;middle' --size 48

Pretrains a small residual network without labels, in each way for as many epochs as fit into the minutes asked for. Prints kNN and
few-label accuracy on the images put aside, for each seed.
"""
import platform, tempfile, time, warnings
from datetime import date
from statistics import mean
from fastcore.script import call_parse
from fastai.vision.all import *
from fastbyol.all import *
from fastbyol.demo import small_resnet
from fastbyol.learner import ViewSizes
from imagenette_cpu import step_seconds

def cut_wide(folder):
    "Photos 3:2, without their upper and lower sixth, in a temporary folder"
    out = Path(tempfile.mkdtemp())
    for fn in find_images(folder):
        im,file = Image.open(fn),out/Path(fn).relative_to(folder).with_suffix('.png')
        file.parent.mkdir(parents=True, exist_ok=True)
        im.crop((0, im.height//6, im.width, im.height-im.height//6)).save(file)
    return out

@call_parse
def main(
    folder:str, # labelled images
    teacher:str='tf_efficientnet_lite0', # timm name
    weights:str=None, # file of its published weights; downloaded when left out
    minutes:float=6., # time for each pretraining
    size:int=64, # side of the pupil's views in pixels
    teacher_size:int=64, # side at which the teacher sees them
    bs:int=64, # images per batch
    seeds:str='0,1,2', # seeds of the halves, the weights and the labels
    per_class:str='5,25', # labels per class
    draws:int=3, # draws of labels for each seed
    only:str='alone;with a teacher', # of these, 'growing views' and 'middle', between semicolons
    wide:bool=False, # cut photos to 3:2 first
):
    "Ways to spend the same minutes on BYOL"
    warnings.filterwarnings('ignore', category=FutureWarning) # of torch, about its own modules
    print(f"{date.today()}, {torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}")
    if wide: folder = cut_wide(folder)
    ways,epochs = {'alone':{}, 'growing views':{}, 'middle':{}},{}
    if 'with a teacher' in only.split(';'):
        frozen = as_encoder(teacher, **(dict(pretrained_cfg_overlay=dict(file=weights)) if weights else {}))
        frozen.view_size = teacher_size
        ways['with a teacher'] = dict(teacher=frozen)
    def learner(dls, name, size=size):
        return byol_learner(dls, small_resnet(3, (16,32,64,128)), hidden_size=1024, tau=.99, size=size, **ways[name])
    for seed in map(int, seeds.split(',')):
        train,test = split_files(folder, .5, seed)
        labelled = labelled_dls(train, size, valid=test, in_memory=True)
        crops = {name:'middle' if name=='middle' else 'whole' for name in only.split(';')}
        opened = {o:unlabelled_dls(train, size, bs, valid_pct=0, in_memory=True, crop=o) for o in {*crops.values()}}
        for name,crop in crops.items():
            dls = opened[crop]
            sizes = (size//2,size*3//4,size) if name=='growing views' else (size,)
            kind = 'alone' if name=='middle' else name # its steps are as long
            if kind not in epochs: # the same for all seeds
                per_step = mean(step_seconds(learner(dls, name, o), 30) for o in sizes)
                epochs[kind] = max(1, round(minutes*60/(per_step*len(dls.train))))
            set_seed(seed)
            learn = learner(dls, name)
            random = knn_accuracy(learn, labelled.train, labelled.valid)
            start = time.time()
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs[kind], 2e-3, cbs=ViewSizes(sizes))
            seconds = time.time()-start
            knn = knn_accuracy(learn, labelled.train, labelled.valid)
            few = label_efficiency(learn, labelled, per_class=[int(o) for o in per_class.split(',')], seeds=draws,
                                   contestants=('BYOL, linear',), seed=seed)
            linear = ', '.join(f'{row.per_class:g} labels {100*row["mean"]:.1f}' for _,row in few.iterrows())
            print(f"seed {seed}, {name:14}: {epochs[kind]} epochs, {seconds:.0f} s, kNN {100*random:.1f} → {100*knn:.1f} %, {linear}", flush=True)
