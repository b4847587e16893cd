# %% [markdown]
# # How much rank does each layer of a ViT or a BERT need?
#
# LoRA asks for a rank before training begins. The gradient at the start already knows something:
# its singular values say which directions of a layer the data ask for, and how strongly. Here we
# read ranks off it, first where the answer is known, then in a ViT, then in a BERT.

# %%
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import style

from lorajax import adapters, data, finetune, models, plots, tasks
from lorajax.studies import simulation

style.use(plots.STYLE)

# %% [markdown]
# ## A network whose ranks are known
#
# Two branches: `left` misses an update of rank 2, `right` one of rank 4. Labels are noisy.


# %%
class Branches(nnx.Module):
    def __init__(self, rngs):
        self.left = nnx.Linear(24, 16, rngs=rngs)
        self.right = nnx.Linear(24, 20, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate([self.left(x), self.right(x)], axis=-1)


draw = np.random.default_rng(0)


def update(m, n, rank):
    """A matrix with `rank` singular values of 1."""
    left, right = (np.linalg.qr(draw.normal(size=(k, k)))[0] for k in (m, n))
    return left[:, :rank] @ right[:rank]


branches = Branches(nnx.Rngs(0))
missing = np.concatenate([update(24, 16, 2), update(24, 20, 4)], axis=1)
x = draw.normal(size=(4000, 24)).astype("float32")
y = np.asarray(branches(x)) + x @ missing + 0.3 * draw.normal(size=(4000, 36))
batches = [(x[i : i + 500], y[i : i + 500].astype("float32")) for i in range(0, 4000, 500)]


def loss(model, batch):
    """One loss a sample."""
    return 0.5 * jnp.sum((model(batch[0]) - batch[1]) ** 2, axis=-1)


# %% [markdown]
# ## Your prediction
#
# The gradient is a mean over 4000 samples, so it carries noise, which has singular values too.
# **Without knowing the noise, how could one tell which of them to believe?**
#
# The rule `split_half` halves the data. Half the *difference* of the two halves' gradients has
# the noise of their mean and none of its signal: what stands above its largest singular value is
# signal. There is no constant to choose.

# %%
selection = adapters.select_ranks(branches, loss, batches, rule="split_half")
fig, ax = plots.figure()
for each, mark in zip(selection.layers, "os", strict=True):
    values = np.asarray(each.singular_values)
    (line,) = ax.semilogy(1 + np.arange(len(values)), values, mark, label=each.path)
    ax.axhline(each.floor, color=line.get_color(), ls="--", lw=1)
ax.set(xlabel="place i", ylabel="singular value i of the gradient")
ax.legend(title="dashed: floor of the noise")
fig

# %%
print(selection)
print(selection.ranks)

# %% [markdown]
# Two and four, as planted.
#
# ## A ViT
#
# A small ViT that was trained on Fashion-MNIST comes with the package, and so do digits of MNIST.
# The gradient passes through the head, so the head has to fit the new task first: behind a random
# head it would say little.

# %%
train = data.load("mnist-sample").train.take(slice(512))
vit = models.load("vit-fashion-mnist", classes=10)
task = tasks.Images.of(vit.config)
vit = finetune.fit_head(vit, task, train, epochs=2)

# %% [markdown]
# **Predict**: which layers of a block will ask for most rank, those of attention (query, key,
# value) or the MLP? The first block or the last?

# %%
chosen = finetune.select_ranks(vit, task, train, targets="blocks/**", max_rank=16)
print(chosen)


# %%
def draw_ranks(selection, title):
    """A bar a layer, one color for each kind of layer."""
    names = [each.path.removeprefix("blocks/") for each in selection.layers]
    kinds = list(dict.fromkeys(name.partition("/")[2] for name in names))
    fig, ax = plots.figure(size=(5.2, 2.6))
    colors = [f"C{kinds.index(name.partition('/')[2]) % 7}" for name in names]
    ax.bar(range(len(names)), [each.rank for each in selection.layers], color=colors)
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set(ylabel="rank", xlabel="layer", title=title)
    return fig


draw_ranks(chosen, "ViT from Fashion-MNIST to digits, 512 samples")

# %% [markdown]
# The MLP of the first block asks for most here, the queries for least. The ranks differ by layer,
# which is what a single number for all of them cannot say. They are the ranks of the *first*
# step: an update that turns later may need more.
#
# ## A BERT
#
# Any model and any task go through the same function. This BERT is tiny and comes from no corpus:
# it is drawn at random and learns here, in seconds, to say which of two tokens a sequence has
# more of. Its new task asks the same of two other tokens. So the figure shows how the tool works
# on texts, and nothing about language.

# %%
config = models.BertConfig(vocabulary=32, width=32, depth=2, heads=2, context=16, pool="mean")
text_task = tasks.Texts()


def sequences(first, second, count=512):
    """Random tokens, and whether `first` comes more often than `second`."""
    tokens = draw.integers(4, 32, size=(count, 12)).astype(np.int32)
    pair = draw.random((count, 12)) < 0.5
    tokens[pair] = draw.choice([first, second], size=pair.sum())
    more = (tokens == first).sum(1) > (tokens == second).sum(1)
    mask = np.ones(tokens.shape, bool)
    return data.Table({"tokens": tokens, "mask": mask, "labels": more.astype(np.int32)})


bert = models.build(config, rngs=nnx.Rngs(0))
trainer = finetune.Trainer(
    bert, nnx.Param, text_task, finetune.Recipe(steps=150, batch_size=64, learning_rate=3e-3)
)
state = finetune.fit(trainer, sequences(4, 5))
bert, other = trainer.model(state), sequences(6, 7)
for name, table in (("its own pair", sequences(4, 5)), ("the other pair", other)):
    print(f"{name}: {float(trainer.evaluate(state, table).accuracy):.0%} right")

# %% [markdown]
# **Predict**: it needs to look at two other tokens now and to do the same with them. Is that an
# update of high or of low rank, and where?

# %%
bert = finetune.fit_head(bert, text_task, other, epochs=2)
texts = finetune.select_ranks(bert, text_task, other, targets="blocks/**", max_rank=16)
draw_ranks(texts, "a tiny BERT, from one pair of tokens to another")

# %% [markdown]
# ## A real one, where it is there
#
# With the folder of models and texts that `LORAJAX_DATA` names, and the extra `text`, the same
# two calls run on MiniLM and the sentences of SST-2. Without them this cell says so, and the
# notebook is complete all the same.

# %%
folder = simulation.real_texts("tokenizers")
if folder is not None:
    asked = data.text.read_texts(folder / "sst2_dev.tsv", kind="classes")
    tokenizer = data.text.Tokenizer(folder / "minilm-l6")
    sentences, _ = data.text.tables(asked, tokenizer, data.text.Limits(max_length=32))
    sentences = sentences.take(slice(128))
    minilm = models.load(folder / "minilm-l6", classes=2, pool="mean")
    minilm = finetune.fit_head(minilm, text_task, sentences, epochs=1)
    print(finetune.select_ranks(minilm, text_task, sentences, targets="blocks/*/attention/*"))

# %% [markdown]
# If it ran: 128 sentences are few, the floor of the noise is high, and most layers get rank 1 or
# none. More sentences lower the floor. A rank of 0 says that these data *show* nothing, not that
# there is nothing.
#
# ## What the numbers are good for
#
# `chosen.ranks` goes straight into `adapters.adapt(model, chosen.ranks, ...)`, and
# `chosen.peft()` into PEFT. Two cautions. Superfluous rank does little harm ([here is
# why](superfluous_rank.py)), so the rule saves memory rather than accuracy. And as a way to
# *spend a budget* over layers no rule is known here that reliably beats one rank everywhere:
# compare at equal cost before you believe it ([choose a rank](../docs/howto/rank.md)).
#
# ## Exercises
#
# 1. Halve the number of samples of the first example, and halve it again. At how many is a
#    planted direction lost? Compare `rule="random_signs"`, which does not halve the data.
# 2. Read the ranks of the ViT off with a *random* head (leave out `fit_head`). What changes, and
#    why is it misleading?
