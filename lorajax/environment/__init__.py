"""The machine that lorajax runs on: known faults of JAX, versions, folders, files, memory, text.

Importing this room imports no jax; every other room may import it.
"""

from lorajax.environment.faults import CANARIES as CANARIES
from lorajax.environment.faults import GUARD as GUARD
from lorajax.environment.faults import affected as affected
from lorajax.environment.faults import guard as guard
from lorajax.environment.faults import guarded as guarded
from lorajax.environment.faults import scalar_product as scalar_product
from lorajax.environment.faults import vmapped_product as vmapped_product
from lorajax.environment.faults import warn as warn
from lorajax.environment.flags import add_flags as add_flags
from lorajax.environment.flags import compile_fast as compile_fast
from lorajax.environment.flags import wide as wide
from lorajax.environment.machine import cache_folder as cache_folder
from lorajax.environment.machine import code as code
from lorajax.environment.machine import versions as versions
