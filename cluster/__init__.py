"""Where a run happens: the command line, Ray, local processes, MLflow."""
