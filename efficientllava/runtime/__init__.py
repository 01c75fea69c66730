"""The lowest floor: what everything else stands on, and what knows nothing of models.

What the other rooms use of it is imported from here, but for `keeping`, `processes` and `state`, whose functions say
more with the name of their module before them.
"""

from .console import (
    DEBUG,
    TRACEBACKS,
    SweepRefused,
    Tick,
    at_end,
    exit_code,
    former_names,
    hand_over,
    job_failed,
    lines_of,
    of_another_type,
    progress,
    quiet_libraries,
    say,
    sweeping,
)
from .content import MEMO, Memo, digest, source_digest, stamp
from .errors import ConfigError, NotFiniteError, UserError, disk_full, first_line, memory_full, one_line, require_finite
from .files import (
    Lines,
    as_umask,
    json_lines,
    put,
    remove,
    set_aside,
    sha256,
    sources_below,
    whole_file,
    whole_folder,
    write_whole,
)
from .places import (
    ADAPTERS,
    BUILTIN,
    COMMAND,
    CONF,
    HUB,
    PACKAGE,
    PROVENANCE,
    QUANTIZED,
    UNQUANTIZED,
    anchored,
    content_files,
    is_elsewhere,
    is_hub_id,
    is_id,
    is_remote,
    local,
    local_folder,
    peek_json,
    read_json,
    with_config,
)
from .state import RESULTS, Standing
from .store import Entry, Store, growing, library_versions
