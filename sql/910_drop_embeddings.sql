-- Deletes every embedding.

drop table if exists public.event_embeddings;
