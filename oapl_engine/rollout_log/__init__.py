"""What was generated (log), what was done with it (journal), and where every token ended (ledger)."""
