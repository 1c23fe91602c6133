"""Draw nbs/images/card.png, the picture that a link to the docs shows elsewhere

    python tools/make_card.py
"""
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

dark, light, blue, orange = '#14171c', '#f2f4f7', '#4da3ff', '#f0a030'

def box(ax, x, y, text, colour, w=1.5):
    ax.add_patch(FancyBboxPatch((x-w/2, y-.3), w, .6, boxstyle='round,pad=.06,rounding_size=.12', fc=dark, ec=colour, lw=2.5))
    ax.text(x, y, text, color=light, ha='center', va='center', fontsize=15)

def arrow(ax, a, b, colour=light, style='-', rad=0.):
    ax.add_patch(FancyArrowPatch(a, b, arrowstyle='-|>', mutation_scale=18, color=colour, lw=2, ls=style, connectionstyle=f'arc3,rad={rad}', shrinkA=2, shrinkB=2))

def draw():
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=dark)  # 1200 by 630 pixels
    ax = fig.add_axes([0, 0, 1, 1]); ax.set(xlim=(0, 12), ylim=(0, 6.3)); ax.axis('off')
    ax.text(.8, 5.25, 'fastbyol', color=light, fontsize=52, fontweight='bold', va='center')
    ax.text(.8, 4.35, 'Pretrain on images without labels, then fine-tune.\nBYOL for fastai', color='#aab3bd', fontsize=21, va='center', linespacing=1.5)
    # an image, its two views, and the two networks
    ax.add_patch(Circle((1.45, 1.75), .5, color=blue)); ax.add_patch(Circle((1.85, 1.75), .5, color=orange, alpha=.8))
    for y, colour, view, net in ((2.55, blue, 'view 1', 'online'), (.95, orange, 'view 2', 'target')):
        box(ax, 4.2, y, view, colour); box(ax, 6.8, y, net, colour)
        arrow(ax, (2.45, 1.75+(y-1.75)*.25), (3.35, y), colour, rad=.12*np.sign(1.75-y)); arrow(ax, (5.05, y), (5.95, y), colour)
        arrow(ax, (7.65, y), (9.2, 1.75+(y-1.75)*.3), colour, rad=.12*np.sign(1.75-y))
    arrow(ax, (6.8, 2.12), (6.8, 1.38), '#aab3bd', '--'); ax.text(6.95, 1.75, 'EMA', color='#aab3bd', fontsize=13, va='center')
    ax.text(10.1, 1.75, 'agree', color=light, fontsize=22, ha='center', va='center')
    return fig

if __name__=='__main__': draw().savefig(Path(__file__).resolve().parent.parent/'nbs/images/card.png', facecolor=dark, metadata={'Software': None})
