"""What docs/results.md says in words, whatever was measured: how it is made, how settings came."""

from __future__ import annotations

OF_THE_CONTROL = """The control's zero-shot, retrieval and mask lines pass through a text tower or a
mask decoder that is drawn at random, as its teachers are, so they cannot but lie at chance; the
telling ones are kNN, linear and segmentation.
"""

# tests/test_quality.py reads the commands: they must be what the programs take.
COMMANDS = """    make pocket DATA=sets
    radio train experiment=pocket "data.train='sets/*/train-*.tar'" "data.val='sets/*/val-*.tar'"
    radio fuse runs/pocket encoder/ --half
    radio train experiment=pocket "data.train='sets/*/train-*.tar'" "data.val='sets/*/val-*.tar'" \\
        out=runs/control cache=runs/control/cache \\
        teachers.clip.pretrained=null teachers.siglip.pretrained=null \\
        teachers.dinov2.pretrained=null teachers.sam.pretrained=null
    make results DATA=sets STUDENT=pocket CONTROL=runs/control CURVE=runs/pocket \\
        SUBJECTS="pixels constant pocket_clip pocket_siglip pocket_dinov2 pocket_sam student \\
        control step-000800 step-001600 step-002400 step-003200 step-004000"
"""

HOW = f"""`sets` is the folder of image sets (README, "Measure it"). The second `radio train` makes
the control: the same experiment, its 4,000 steps and int8 cache included, but the weights of all
four teachers are drawn from the seed. Without CONTROL and CURVE neither is measured, and what is
stored of them stays. STUDENT is the encoder that ships if not given; the one that these lines make
anew is `encoder/`. SUBJECTS are the columns, and every other checkpoint; all if not given.

{COMMANDS}
The last is `python -m benchmarks.quality --data sets --student pocket --control runs/control
--curve runs/pocket` and SUBJECTS. What is stored of the same weights and pictures is not measured
again.
"""

CHOSEN = """By hand. The recipes read train shards alone and hold no part of them out; the curves in
training.json are of training batches. The history does not say which figures decided between two
settings, so do not take the val figures above for ones that no choice has seen. The student's
steps, repeated views and int8 codes were set by time and disk (5,000 steps and two epochs of views,
then 4,000 and three); its other settings have one value in the history.

What was tried for the lines that do not hold, and how far it came:

- **pocket_dinov2, CamVid at 128 and 256 px.** The recipe has three versions. They differ in how
  new heads are kept from spoiling what the backbone knows: one learning rate for all; a longer
  warm-up of the backbone; a batch norm in the heads, no biases at their start, a rate of their
  own. The last ships; there are no val figures of the others. In its 600 steps DINO's loss did not
  fall (7.00 in the first row of its curve, 7.61 in the last).
- **pocket_sam, COCO by point and by box.** First 1,500 steps of 4 canvases with 16 points and 16
  boxes each (55 CPU minutes; mean IoU 0.43 and 0.59 in the curve's last batch); its commit says
  that small things in COCO are not found yet, val figures are not stored. Then 4,200 steps of 2
  canvases with 8 of each, Muon in the decoder too, superpixels asked for by boxes alone and more
  of COCO's things (81 CPU minutes; 0.50 and 0.62 over the last 50 steps). That ships: its lines
  are the best there is a record of.
- **Mode switch, COCO: siglip's max e.** Nothing was tried; two changes of what the task shows
  concern SAM alone. On Flickr8k's 300 pictures the same line holds.
"""
