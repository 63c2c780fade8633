"""Networks, and which of their numbers are generated; what `classifiers` holds is handed on."""

from pdiff_lib.networks.classifiers import check as check, code_key as code_key, copied as copied, create as create
