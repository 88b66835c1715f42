"""Every route, one module a noun."""

from collections.abc import Sequence

from litestar.handlers import HTTPRouteHandler

from api.routes.access import (
    create_key,
    list_keys,
    log_in,
    log_out,
    revoke_key,
    who_am_i,
)
from api.routes.audit import list_audit
from api.routes.batches import (
    cancel_batch,
    create_batch,
    follow_batch,
    get_batch,
    list_batch_lines,
    list_batch_results,
    list_batches,
)
from api.routes.cluster import get_cluster, get_metrics
from api.routes.events import follow_job, follow_jobs
from api.routes.health import health
from api.routes.jobs import cancel_job, delete_job, get_job, list_jobs
from api.routes.models import list_models, load_model, model_info, unload_model
from api.routes.results import get_attention, get_manifest, get_result, get_table
from api.routes.scans import SCANS
from api.routes.session_results import (
    compare_sessions,
    export_session,
    get_session_results,
    get_session_table,
    import_session,
)
from api.routes.sessions import (
    add_session_scan,
    change_session,
    create_session,
    delete_session,
    follow_session,
    fork_session,
    get_session,
    list_revisions,
    list_sessions,
    save_session,
)
from api.routes.shares import (
    contribute_scan,
    create_share,
    export_shared,
    follow_shared,
    fork_shared,
    get_shared,
    get_shared_results,
    get_shared_table,
    list_shares,
    revoke_share,
)
from api.routes.tokens import tokenize
from api.routes.usage import get_usage, list_users, set_limits

__all__ = ("ROUTES",)

ROUTES: Sequence[HTTPRouteHandler] = (
    *SCANS,
    list_models,
    model_info,
    load_model,
    unload_model,
    tokenize,
    list_jobs,
    get_job,
    cancel_job,
    delete_job,
    follow_job,
    follow_jobs,
    get_result,
    get_manifest,
    get_table,
    get_attention,
    create_batch,
    list_batches,
    get_batch,
    list_batch_lines,
    list_batch_results,
    follow_batch,
    cancel_batch,
    create_session,
    list_sessions,
    import_session,
    get_session,
    save_session,
    change_session,
    delete_session,
    fork_session,
    add_session_scan,
    list_revisions,
    get_session_results,
    get_session_table,
    export_session,
    compare_sessions,
    follow_session,
    create_share,
    list_shares,
    revoke_share,
    get_shared,
    get_shared_results,
    get_shared_table,
    export_shared,
    follow_shared,
    fork_shared,
    contribute_scan,
    who_am_i,
    log_in,
    log_out,
    list_keys,
    create_key,
    revoke_key,
    get_usage,
    list_users,
    set_limits,
    list_audit,
    health,
    get_cluster,
    get_metrics,
)
