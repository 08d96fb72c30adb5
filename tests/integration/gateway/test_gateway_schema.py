"""Requests made up from the gateway's own description: every answer is one that it announces."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from node.gateway.openapi import description
from tests.support import seconds

EXAMPLES = 6
"""Per endpoint, wrong and right ones together."""
NOT_OURS: list[schemathesis.CheckFunction] = [
    negative_data_rejection,  # llama-server takes null for a field that is absent, and so do we
    positive_data_acceptance,  # whether a model embeds or reranks is the model's affair (501)
    schemathesis.checks.not_a_server_error,  # 501 and 503 are honest answers; see the assertion below
]

schema = schemathesis.openapi.from_dict(description())


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_made_up_requests(case: schemathesis.Case[Any], url: str) -> None:
    if isinstance(case.body, dict):
        case.body.update(max_tokens=4, n_predict=4)
    response = case.call(base_url=url, timeout=seconds(20))
    assert response.status_code not in (500, 502, 504), response.text
    case.validate_response(response, excluded_checks=NOT_OURS)
