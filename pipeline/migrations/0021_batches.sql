-- Who rode in the same batch: what `millrace trace` shows of a picture's company.

CREATE INDEX predictions_by_batch ON predictions ((receipt->>'batch_id')) WHERE receipt ? 'batch_id';
