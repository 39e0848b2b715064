"""What happened: checkpoints, intake checks, the ledger, MLflow, lineage."""
